from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("agents.logs", "EYES_ONLY", "WITHOUT_IMAGES"),
        ("agents.logs", "shows_pictures", "shows_images"),
        ("rewards.hub", "pictures", "pil_images"),
        ("var_env.tabular", "MOST_PICTURES", "MOST_IMAGES"),
        ("var_env.tabular", "every_picture", "every_image"),
    ],
)
def test_old_names_work_and_warn(module, old, new):
    home = import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now called {new}"):
        assert getattr(home, old) is getattr(home, new)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'agents\.logs' has no attribute 'nothing'"):
        import_module("agents.logs").nothing  # noqa: B018
