"""The paper's ablations: a table and a figure each, all from the same base policy with the same budget.

The same as ``vartext ablate``: what it does, and its options, are in agents/experiments/ablate.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.ablate import main

    sys.exit(main())
