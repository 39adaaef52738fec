"""`export_policy`, of a checkpoint, and `export_module`, of a module that has trained. Both write the same folder."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lit_did.arguments import check_bools
from lit_did.exporting.card import model_card, needs_peft
from lit_did.exporting.checkpoints import PREFIX, read_checkpoint
from lit_did.models.adapters import REFERENCE_ADAPTER, import_peft, save_policy
from lit_did.models.dropout import dropout_in_config
from lit_did.models.loading import add_lora, load_model
from lit_did.models.names import load_tokenizer, local_folder
from lit_did.models.wrappers import inner, is_peft, plain_name
from lit_did.modules import LitDPO
from lit_did.modules.run_facts import KEY, run_facts
from lit_did.writing import whole_folder

Kind = Literal["adapter", "merged", "full"]
CARD = "README.md"
_SENTENCE = "The quick brown fox jumps over the lazy dog."
# The largest difference between logits of a merged and an unmerged model, relative to their norm.
_MERGED, _MERGED_HALF = 1e-4, 0.05
_UNMERGED = "Export without `merge`, and load that folder with peft's AutoPeftModelForCausalLM."
REPLACED_MARK = "<!-- Written by lit_did.callbacks.ExportPolicy, which replaces this folder with newer weights. -->"


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    kind: Kind
    """"adapter": an adapter alone. "merged": a model with its adapter merged. "full": a model without an adapter."""
    base_model: str | None
    """the name or folder of the model that the policy was made from; None: unknown"""
    checkpoint: Path | None
    """the checkpoint that was read; None for a module"""
    needs_peft: bool = False
    """whether only peft loads the adapter right, see `lit_did.exporting.card.needs_peft`"""

    def describe(self) -> str:
        """What was written and how to use it."""
        base = self.base_model or "its base model"
        what = {
            "adapter": f"an adapter for {base}, with its tokenizer",
            "merged": "a whole model, with the adapter merged, and its tokenizer",
            "full": "a whole model and its tokenizer",
        }
        loader, hint = "transformers.AutoModelForCausalLM", ""
        if self.needs_peft:
            loader = "peft.AutoPeftModelForCausalLM"
            hint = (
                "\nTransformers' AutoModelForCausalLM leaves out a part of this adapter (DoRA) and gives another "
                "model. To get a folder that it opens right, export with --merge."
            )
        if self.kind == "adapter" and os.path.isdir(base):
            hint += "\nIts base model is a folder of this machine. For other machines, export with --merge."
        return (
            f"Written: {self.folder}, {what[self.kind]}.\n"
            f'Load it with {loader}.from_pretrained("{self.folder}") and '
            f'transformers.AutoTokenizer.from_pretrained("{self.folder}").{hint}'
        )


def export_policy(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    policy: str | None = None,
    tokenizer: str | None = None,
    merge: bool = False,
    quiet: bool = False,
) -> Exported:
    """Writes the policy of a checkpoint as a folder for transformers.

    The folder holds a model or an adapter in safetensors, the tokenizer with the chat template of the training, and a
    model card. It appears whole or not at all.

    Args:
        checkpoint: A checkpoint of a run, or the run's folder. From a folder it takes the best checkpoint if a
            ModelCheckpoint has monitored a metric, and else the newest.
        folder: The folder to write. It must be new or empty.
        policy: The model that training started from: "smollm2", a folder or a name of the hub. Needed only if the run
            was given a model object.
        tokenizer: The tokenizer's name or folder. Needed only if the run was given a tokenizer without a name.
        merge: Merges an adapter into the base model, in the base model's dtype.
        quiet: Prints nothing.

    Raises:
        FileNotFoundError: There is no such checkpoint, model or tokenizer.
        FileExistsError: `folder` is a link or a file, or holds files.
        ValueError: The checkpoint is cut off, of another project or of another policy, or there is nothing to merge.
    """
    check_bools(merge=merge, quiet=quiet)
    target = check_new(folder)
    found = read_checkpoint(Path(checkpoint))
    if found.which and not quiet:
        print(f"Read: {found.path}, {found.which}.")
    facts, arguments = found.content[KEY], found.content["hyper_parameters"]
    if merge and facts["adapter"] is None:
        raise ValueError(f"Expected `merge` to be False, because the policy of {found.path} has no adapter.")
    _warn_of_another(policy, arguments.get("policy") or facts["base_model"], found.path)
    tokens = _tokenizer(facts["data"], tokenizer, policy or arguments.get("policy"))
    model, dtypes = _load(found.content, found.path, policy, merge)
    base_model = _base_name(model)
    if merge:
        model = _merge(model, dtypes, tokens(_SENTENCE, return_tensors="pt").input_ids)
    kind: Kind = "merged" if merge else "full" if facts["adapter"] is None else "adapter"
    card = model_card(
        facts, arguments, kind=kind, base_model=base_model, title=target.name, chat=bool(tokens.chat_template)
    )
    _write(target, model, tokens, card)
    peft_alone = kind == "adapter" and needs_peft(facts["adapter"])
    exported = Exported(target, kind, base_model, found.path, peft_alone)
    if not quiet:
        print(exported.describe())
    return exported


def export_module(
    module: LitDPO,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    state: Mapping[str, torch.Tensor] | None = None,
    replace: bool = False,
) -> Exported:
    """Writes the policy of a module, which stays as it is, as a folder for transformers.

    Args:
        module: A module whose parameters are not sharded, or that comes with its `state`.
        folder: The folder to write. It must be new or empty.
        tokenizer: The tokenizer. None: that of the Trainer's data module.
        state: Whole parameters of the policy by name, to be written instead of its own. None: its own.
        replace: Whether the folder may be one that was written with `replace=True` before.

    Raises:
        FileExistsError: `folder` is a link or a file, or holds other files.
        ValueError: There is no tokenizer.
    """
    target = check_new(folder, replace=replace)
    policy, facts = module.loaded_models().policy, run_facts(module)
    data = getattr(module._trainer, "datamodule", None)
    tokens = getattr(data, "tokenizer", None) if tokenizer is None else tokenizer
    if tokens is None:
        raise ValueError("Expected `tokenizer` to be given, because the Trainer's data module has none, but got None.")
    tokens = _with_template(tokens, facts["data"])
    kind: Kind = "full" if facts["adapter"] is None else "adapter"
    card = model_card(
        facts,
        dict(module.hparams),
        kind=kind,
        base_model=facts["base_model"],
        title=target.name,
        chat=bool(tokens.chat_template),
        mark=REPLACED_MARK if replace else "",
    )
    with dropout_in_config(module.switched_off):
        _write(target, policy, tokens, card, state, replace)
    return Exported(target, kind, facts["base_model"], None, needs_peft(facts["adapter"]))


def check_new(folder: str | os.PathLike, *, replace: bool = False, argument: str = "`folder`") -> Path:
    """The absolute path of a folder that can be written.

    Args:
        folder: The path.
        replace: Whether it may be a folder that `export_module(..., replace=True)` wrote.
        argument: The name of the argument, for the error.

    Raises:
        FileExistsError: It is a link or a file, or holds other files.
        OSError: It cannot be made.
    """
    path = Path(os.path.abspath(Path(folder).expanduser()))  # without a trailing slash, and links are not followed
    if path.is_symlink():
        found = "a link"
    elif path.is_dir():
        card = path / CARD
        ours = card.is_file() and REPLACED_MARK in card.read_text(encoding="utf-8", errors="replace")
        if (replace and ours) or not any(path.iterdir()):
            return _can_be_made(path, argument)
        found = "a folder with files"
    elif path.exists():
        found = "a file"
    else:
        return _can_be_made(path, argument)
    raise FileExistsError(f"Expected {argument} to be new or empty, but {path} is {found}. Choose another one.")


def _can_be_made(path: Path, argument: str) -> Path:
    """`path`, if a folder can be made in the nearest folder above it that exists."""
    try:
        with tempfile.TemporaryDirectory(dir=next(above for above in path.parents if above.exists())):
            return path
    except OSError as error:
        raise OSError(f"Expected {argument} to be a folder that can be made, but got {path}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------


def _load(
    content: Mapping[str, Any], path: Path, policy: str | None, merge: bool
) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """The policy with its trained weights, and the dtypes of the base model by parameter."""
    facts, arguments = content[KEY], content["hyper_parameters"]
    name = policy or arguments.get("policy")
    if name is None:
        origin = facts["base_model"]
        hint = f" The object was loaded from {origin}." if origin else ""
        raise ValueError(
            f"Expected `policy` to name the model that training started from, because the run of {path} was given a "
            f"model object, but got None.{hint} Pass `--policy NAME`."
        )
    state = {
        plain_name(key).removeprefix(PREFIX): value
        for key, value in content["state_dict"].items()
        if plain_name(key).startswith(PREFIX) and REFERENCE_ADAPTER not in key.split(".")
    }
    options = {k: v for k, v in (arguments.get("model_kwargs") or {}).items() if k != "distributed_config"}
    if facts["adapter"] is None:  # what was frozen had the dtype of what was trained
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        options |= {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    else:
        options = {"dtype": "auto", **options}
    model = load_model(name, "policy", options)
    if merge and getattr(inner(model), "is_quantized", False):
        raise ValueError(
            "Expected a base model that is not quantised to merge the adapter into, but the run's `model_kwargs` "
            f"quantise {name}. {_UNMERGED}"
        )
    base_dtypes = {plain_name(key): p.dtype for key, p in inner(model).named_parameters()}
    if facts["adapter"] is not None and not is_peft(model):
        peft = import_peft(f"The adapter of {path}")
        config = {**facts["adapter"], "base_model_name_or_path": None, "inference_mode": False}
        model = add_lora(model, peft.PeftConfig.from_peft_type(**config), facts["adapter_name"])
    own = {plain_name(key): value for key, value in model.state_dict().items()}
    wrong = sorted(key for key, value in state.items() if key not in own or own[key].shape != value.shape)
    if wrong or not state:
        raise ValueError(
            f"Expected the trained parameters of {path} to be those of the policy {name}, but {len(wrong)} of "
            f"{len(state)} have no place in it, or another shape. "
            + (f"The first is {wrong[0]}. " if wrong else "")
            + "Pass the model that training started from as `policy`."
        )
    # An adapter keeps its own dtype. A whole model is filled in place, which keeps its tied weights tied.
    model.load_state_dict(state, strict=False, assign=is_peft(model))
    return model, base_dtypes


def _warn_of_another(policy: str | None, trained: str | None, path: Path) -> None:
    """Warns if `policy` is another model than the one that training started from."""
    if policy is None or trained is None:
        return
    given = local_folder(policy, "policy")
    if str(policy) == trained or (given is not None and given == Path(trained).expanduser().resolve()):
        return
    try:
        if given is not None and given == local_folder(trained, "policy"):  # such as smollm2
            return
    except FileNotFoundError:  # it was moved
        pass
    warnings.warn(
        f"The policy is exported as one of {policy}, but the run of {path} started from {trained}. If these are not "
        "the same weights, what is exported is another model than the trained one. Leave `policy` out, unless the "
        "model was moved or renamed.",
        stacklevel=3,
    )


def _merge(policy: nn.Module, dtypes: Mapping[str, torch.dtype], input_ids: torch.Tensor) -> nn.Module:
    """The base model with the adapter merged into it, in the base model's dtypes.

    Args:
        policy: The PeftModel.
        dtypes: The dtypes of the base model's parameters by name.
        input_ids: [1, T] tokens on which both models have to give the same logits.

    Raises:
        ValueError: They do not, or the adapter changes one of two layers that share a weight.
    """
    peft: Any = policy
    _check_untied(peft)
    half = next((dtype for dtype in dtypes.values() if dtype in (torch.bfloat16, torch.float16)), None)
    expected = _logits(policy, input_ids, half)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # which may be right
        model = peft.merge_and_unload(safe_merge=True)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(plain_name(name), parameter.dtype))
    error = (_logits(model, input_ids, half) - expected).norm() / expected.norm()
    if not error <= (_MERGED_HALF if half else _MERGED):
        raise ValueError(
            "Expected the merged model to give the logits of the model with its adapter, but they differ by "
            f"{error:.1%}. {_UNMERGED}"
        )
    return model


def _check_untied(peft: Any) -> None:
    """Raises ValueError if the adapter changes one of two layers that share a weight: merging would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights = Counter(id(module._parameters.get("weight")) for module in peft.modules())
    for name, module in peft.named_modules():
        if isinstance(module, BaseTunerLayer) and weights[id(getattr(module.get_base_layer(), "weight", name))] > 1:
            raise ValueError(
                f"Expected `merge` to be False, because the adapter changes {name.removeprefix('base_model.model.')}, "
                f"which shares its weight with another layer (tied embeddings), but got True. {_UNMERGED}"
            )


def _logits(model: Any, input_ids: torch.Tensor, half: torch.dtype | None) -> torch.Tensor:
    """[T, V] float32. Layers of an adapter may have another dtype than the base model's."""
    with torch.no_grad(), torch.autocast("cpu", half, enabled=half is not None):
        return model.eval()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[0].float()


def _tokenizer(data: Mapping[str, Any] | None, given: str | None, policy: str | None) -> Any:
    """The tokenizer of the run, or else that of its policy, with the chat template of the training."""
    name = given or (data or {}).get("tokenizer") or (policy if data is None else None)
    if name is None:
        raise ValueError(
            "Expected `tokenizer` to be a name or a folder, because the run's tokenizer has no name, but got None. "
            "Pass `--tokenizer NAME`."
        )
    tokenizer = load_tokenizer(name)
    expected = (data or {}).get("num_tokens")
    if expected is not None and len(tokenizer) != expected:
        raise ValueError(
            f"Expected `tokenizer` to have the {expected} tokens of the training, but {name} has {len(tokenizer)}. "
            "Save the run's tokenizer with `save_pretrained`, and pass that folder."
        )
    return _with_template(tokenizer, data)


def _with_template(tokenizer: Any, data: Mapping[str, Any] | None) -> Any:
    template = (data or {}).get("chat_template")
    if template is not None and tokenizer.chat_template != template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def _base_name(policy: nn.Module) -> str | None:
    return getattr(inner(policy), "name_or_path", None) or None


def _write(
    target: Path,
    policy: nn.Module,
    tokenizer: Any,
    card: str,
    state: Mapping[str, torch.Tensor] | None = None,
    replace: bool = False,
) -> None:
    with whole_folder(target) as beside:
        save_policy(policy, beside, state)
        tokenizer.save_pretrained(beside)
        (beside / CARD).write_text(card, encoding="utf-8")
        check_new(target, replace=replace)  # somebody may have written there meanwhile
