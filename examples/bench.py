"""Time the environment, the reward, sampling and updates, and compare with the targets for two cores.

The same as ``vartext bench``: what it does, and its options, are in agents/experiments/bench.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.bench import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
