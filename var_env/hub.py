"""To the Hugging Face hub and back: `huggingface_hub.ModelHubMixin` for the files of tokenizers, policies and agents.

``push_to_hub("owner/name")`` and ``save_pretrained(folder)`` write what ``save`` writes, with a model card;
``from_pretrained("owner/name")``, or of a folder, reads it with the checks that ``load`` makes. No code is read:
weights are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rewards.reason import reason

if TYPE_CHECKING:
    from typing_extensions import Self

FILES = ("*.safetensors", "*.json", "SHA256SUMS")  # what is fetched: nothing that could be run
CARD = """---
{{ card_data }}
---

# {{ repo_id }}

A VARText {{ kind }}, `{{ class_name }}`: text-to-image generation by next-scale prediction.

```python
from {{ module }} import {{ loader }}

{{ kind }} = {{ loader }}.from_pretrained("{{ repo_id }}")
```
{% if config %}
## Configuration

| option | value |
|---|---|
{% for name, value in config.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% endif -%}
{% if settings %}
## How it was trained

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% endif -%}
{% if metrics %}
## On held-out prompts

| metric | mean | 95 % interval |
|---|---|---|
{% for name, (mean, low, high) in metrics.items() -%}
| {{ name }} | {{ "%.3f" | format(mean) }} | {{ "%.3f" | format(low) }} to {{ "%.3f" | format(high) }} |
{% endfor -%}
{% endif -%}
{% if faults %}
## Planted faults of its base

The policy that training began from draws these wrong on purpose, with the given rates, for training to repair.

{% for fault in faults -%}
- {{ fault }}
{% endfor -%}
{% endif %}"""


class HubMixin(ModelHubMixin, library_name="vartext", tags=["vartext", "text-to-image"], model_card_template=CARD):
    """What can be pushed to the hub. A class says how by `_save_pretrained` and `_from_folder`."""

    hub_kind = ""  # "tokenizer", "policy" or "agent"
    hub_loader = ("", "")  # the module and the class that read any of this kind

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # The mixin's own keeps a config of the constructor's arguments, which files here have already.
        return object.__new__(cls)

    @classmethod
    def _from_folder(cls, folder: Path, **options: Any) -> Any:
        """What a folder holds, whatever its class. ``OSError``, ``ValueError``: it holds none, or a damaged one."""
        raise NotImplementedError

    def _write_config(self, folder: Path) -> None:
        """``config.json``, by which the hub counts downloads."""
        content = {"library": "vartext", "kind": self.hub_kind, "class": type(self).__name__}
        (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Read what `save_pretrained` or `push_to_hub` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or "owner/name" on the hub.
            force_download, token, cache_dir, local_files_only, revision: as in huggingface_hub.
            options: of ``load``: a policy's or a tokenizer's takes none, an agent's ``env``, ``device`` and settings.

        Raises:
            OSError: the hub does not give it, as when this machine is offline.
            ValueError: it is damaged, of another kind, or of another class than this one.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        if not folder.is_dir():
            folder = fetched(
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        check_kind(folder, name, cls.hub_kind)
        found = cls._from_folder(folder, **options)
        if not isinstance(getattr(found, "unwrapped", found), cls):
            module, loader = cls.hub_loader
            raise ValueError(
                f"{name} holds a {type(found).__name__} and no {cls.__name__}: read it with {module}.{loader}"
            )
        return found

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Upload to the hub as "owner/name", and return the address of the commit.

        Args:
            repo_id: the repository, which is made if there is none.
            options: as in huggingface_hub. ``model_card_kwargs`` fills the card; `agents.model_card.of_run` makes them.
        """
        card = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(self, **content: Any) -> ModelCard:  # type: ignore[override]
        """The card of this object.

        Args:
            content: "settings", a mapping; "metrics", by name the mean and its interval; "faults", a list of texts.
        """
        module, loader = self.hub_loader
        own = {"repo_id": "owner/name", "kind": self.hub_kind, "class_name": type(self).__name__}
        config = getattr(self, "config", None) if self.hub_kind != "agent" else None
        return super().generate_model_card(**{**own, "module": module, "loader": loader, "config": config, **content})


def by_name(place: str) -> Any:
    """What "module:function" names. What reads any class of a kind stands above the kind's base, which asks for it."""
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


def fetched(name: str, **options: Any) -> Path:
    """The folder of a repository's files, from the hub or from its cache. ``OSError`` with the remedy."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), **options))
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub's repositories are called owner/name"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        why = reason(error).partition("\n")[0]
        raise OSError(
            f"cannot get {name!r} from the hub: check the name and the network, fetch it with `hf download {name}`, or "
            f"give a folder ({why})"
        ) from error


def check_kind(folder: Path, name: str, kind: str) -> None:
    """``ValueError`` unless a folder's ``config.json`` says that it holds this kind of thing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["kind"] if config["library"] == "vartext" else None
    except (OSError, KeyError, TypeError, ValueError):
        found = None
    if found is None:
        raise ValueError(f"{name} was not written by save_pretrained() or push_to_hub() of VARText")
    if found != kind:
        raise ValueError(f"{name} holds a {found} and no {kind}: read it as a {found}")
