"""Time the environment, the reward, sampling and updates, and compare with the targets for two cores.

The same as ``vartext bench``: what it does, and its options, are in agents/experiments/bench.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.bench import main

    sys.exit(main())
