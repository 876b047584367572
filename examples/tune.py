"""Find settings for each agent with the same number of trial runs, on validation prompts.

What it does, and its options, are in agents/experiments/tune.py; ``python examples/tune.py --help`` tells them.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.tune import main

    sys.exit(main())
