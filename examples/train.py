"""Train one agent on VARText-v0, with every setting an option.

The same as ``vartext train``: what it does, and its options, are in agents/experiments/train.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.train import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
