"""The paper's ablations: a table and a figure each, all from the same base policy with the same budget.

The same as ``vartext ablate``: what it does, and its options, are in agents/experiments/ablate.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.ablate import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
