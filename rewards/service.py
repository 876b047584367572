"""The reward service, whose home is ``serving/service.py``: `python -m rewards.service` starts it."""

from rewards.serving.service import create_app, main, parse

__all__ = ["create_app", "main", "parse"]

if __name__ == "__main__":
    main()
