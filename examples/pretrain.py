"""Train the tokenizer and the base policy of VARText by teacher forcing, from a seed.

The same as ``vartext pretrain``: what it does, and its options, are in agents/experiments/pretrain.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.pretrain import main

    sys.exit(main())
