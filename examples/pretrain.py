"""Train the tokenizer and the base policy of VARText by teacher forcing, from a seed.

The same as ``vartext pretrain``: what it does, and its options, are in agents/experiments/pretrain.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.pretrain import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
