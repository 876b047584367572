"""Train agents from the same base policy with the same budget and compare them on the same held-out prompts.

The same as ``vartext compare``: what it does, and its options, are in agents/experiments/compare.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.compare import main

    sys.exit(main())
