"""Train one agent on VARText-v0, with every setting an option.

The same as ``vartext train``: what it does, and its options, are in agents/experiments/train.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.train import main

    sys.exit(main())
