"""Measure a policy on held-out prompts: the paper's metrics with 95 % bootstrap intervals, and an image.

The same as ``vartext evaluate``: what it does, and its options, are in agents/experiments/evaluate.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.evaluate import main

    sys.exit(main())
