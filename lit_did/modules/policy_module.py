"""PolicyModule: a LightningModule that holds a policy beside its reference, without an objective."""

from __future__ import annotations

import gc
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_did.batches.checks import checked_sequences
from lit_did.batches.sequences import Sequences
from lit_did.models import forward, loading
from lit_did.models.adapters import ADAPTER
from lit_did.models.context_parallel import context_group
from lit_did.models.dropout import Probability, switch_off_dropout
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.quantisation import check_has_adapter
from lit_did.models.sharding import distributed_config, is_sharded, of_policy, of_reference, shard
from lit_did.models.wrappers import is_peft, plain_name, unwrapped
from lit_did.modules.checkpoint import TrainedState
from lit_did.modules.checks import keep_noise_out, warn_unless_policy_is_reference
from lit_did.modules.pairs import of_policy_alone, with_reference_logprob
from lit_did.modules.quiet_start import QuietStart
from lit_did.modules.strategies import (
    check_averages_of_weights,
    check_backward_is_run,
    check_context_can_be_shared,
    check_gradients_are_exchanged,
    check_reference_can_be_cached,
    check_same_batch,
    check_same_on_all_processes,
    check_settings_are_used,
    check_settings_have_a_reference,
    check_unsharded_with_ddp,
)
from lit_did.ops import SequenceStatistics
from lit_did.reference_cache.fingerprint import quick_digest
from lit_did.reference_cache.model_files import files_digest, quick_files_digest, reference_name
from lit_did.reference_cache.precompute import (
    CachedLogprobs,
    CachedReference,
    cached_reference,
    files_digest_of_all,
)
from lit_did.reference_cache.storage import ReferenceCache


class PolicyModule(TrainedState):
    """Loads a policy and its reference, checks that the strategy trains them right, and reads batches.

    A subclass saves hyperparameters that are named as LitDPO's, sets `given` and calls `configure_model`.
    """

    given: dict[str, Any]
    """the arguments of `lit_did.models.loading.load_pair`, until the models are loaded"""
    switched_off: Sequence[Probability] = ()
    """the dropout that the policy's configuration had, for a policy that is saved"""
    _cache: CachedReference | CachedLogprobs | None = None
    _cache_found: CachedLogprobs | None = None
    """before training starts: the cache that makes a reference unnecessary, which was not loaded"""
    _reference_files: Callable[[Path], str | None] | None = None
    """returns the digest of the files of a reference that was given by name"""
    _distributed_settings: Any = None  # `distributed_config` of `model_kwargs`
    _same_batches: frozenset[Any] = frozenset()  # the stages in which processes that share a row had the same batch
    _noise_checked = False
    _start_checked = False

    @property
    def policy(self) -> nn.Module | None:
        """The model in training. None until a policy that was given by name is loaded."""
        return None if self.models is None else self.models.policy

    @property
    def reference(self) -> nn.Module | None:
        """The reference model. None: there is none, or it is the policy with its adapter off or another adapter."""
        return None if self.models is None else self.models.reference

    @property
    def context_parallel_size(self) -> int:
        """The number of processes that share a batch, see `lit_did.models.context_parallel`."""
        return self.hparams["context_parallel_size"]

    def __setattr__(self, name: str, value: Any) -> None:
        # A module would otherwise be registered under this name, and the properties would hide it.
        if name in ("policy", "reference"):
            if self.models is None:
                raise RuntimeError(
                    f"Expected the models to be loaded before `{name}` is set, but they are not. To load another model "
                    f"than the named one, set `given[{name!r}]` to it instead, and then call "
                    "`PolicyModule.configure_model`, as a Trainer does."
                )
            setattr(self.models, name, value)
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """Loads the models, unless they are there. Under ModelParallelStrategy they are sharded."""
        settings = self.given["model_kwargs"].pop("distributed_config", None) if self.given else None
        self._distributed_settings = self._distributed_settings or settings
        if self._trainer is not None:
            check_settings_are_used(self.trainer.strategy, self._distributed_settings)
        config = self._distributed_config()
        if self.models is None:
            self._load_models(config)
        mesh = self.device_mesh
        if config is not None and mesh is not None:
            if self._cache_found is None:
                check_settings_have_a_reference(config, self.reference)
            for argument, model, its_config in (
                ("policy", self.policy, of_policy(config)),
                ("reference", self.reference, of_reference(config)),
            ):
                if model is not None:
                    check_same_on_all_processes(self.trainer, argument, model)
                    shard(model, its_config, mesh, argument)
        if self._trainer is not None:
            check_unsharded_with_ddp(self)

    def _distributed_config(self) -> Any:
        """transformers' settings for the Trainer's ModelParallelStrategy. None: another strategy, or one process."""
        strategy: Any = None if self._trainer is None else self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or strategy.world_size == 1:
            return None
        mixed = self.trainer.precision == "bf16-mixed"
        return distributed_config(strategy.device_mesh, self._distributed_settings, mixed_precision=mixed)

    def _load_models(self, config: Any) -> None:
        options: Any = self.hparams
        given = dict(self.given)
        if config is not None:
            model_kwargs = given["model_kwargs"]
            gathered = config.fsdp_mixed_precision and not {"dtype", "torch_dtype"} & model_kwargs.keys()
            dtype = {"dtype": torch.bfloat16} if gathered else {}  # as FSDP gathers the policy's weights
            given["model_kwargs"] = {**model_kwargs, "distributed_config": of_policy(config)}
            given["reference_kwargs"] = {**model_kwargs, **dtype, "distributed_config": of_reference(config)}
        name, model_kwargs = reference_name(self.given), self.given["model_kwargs"]
        self._reference_files = None if name is None else partial(files_digest, name, model_kwargs)
        if config is not None:
            self._cache_found = self._find_cache()
        if self._cache_found is not None:
            given |= {"reference": None, "needs_reference": False}
        policy, reference = loading.load_pair(**given)
        models = PolicyAndReference(
            policy,
            reference if given["needs_reference"] else policy,
            padding_free=options.padding_free,
            share_prompts=options.share_prompts,
            backend=options.backend,
        )
        if options.disable_dropout:
            self.switched_off = switch_off_dropout(policy)
        if options.gradient_checkpointing or options.recompute_elementwise:
            loading.checkpoint_activations(policy, keep_products=not options.gradient_checkpointing)
        self._dims = {plain_name(name): p.dim() for name, p in policy.named_parameters()}  # later they may be shards
        adapter = "" if models.adapter is None else " and an adapter"  # its values are in checkpoints
        digests: dict[str, str | None] = {}  # now: later the reference may be sharded, cast or freed
        if given["needs_reference"]:
            digests["weights"] = quick_digest(policy if models.reference is None else models.reference)
        if self.given["needs_reference"] and name is not None:
            digests["files"] = quick_files_digest(name, model_kwargs)
        self._reference_digests = {kind: digest + adapter for kind, digest in digests.items() if digest is not None}
        policy.train()  # from_pretrained leaves eval mode, which Lightning keeps
        self.models, self.given = models, {}
        if options.cache_reference is not None:  # else DDP would hold on to what is freed
            values = chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
            names = [name for name, _ in values if name.startswith("models.reference.")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def _find_cache(self) -> CachedLogprobs | None:
        """The cache that makes a sharded reference model unnecessary. None: there is none, or none of this reference.

        Whether it has all pairs is checked when training starts.
        """
        path, given = self.hparams["cache_reference"], self.given
        own = given["reference"] == ADAPTER or (given["reference"] is None and given["lora"] is not None)
        if self.hparams["cache_kind"] != "logprobs" or own or self.trainer.state.fn != TrainerFn.FITTING:
            return None
        found = self.trainer.strategy.broadcast(ReferenceCache.fingerprint(path))
        known = {"kind": "logprobs", "precision": self.trainer.precision}
        if found is None or any(found.get(name) != value for name, value in known.items()):
            return None
        if files_digest_of_all(self.trainer, self._reference_files, path) != found["reference"]:
            return None
        return CachedLogprobs(ReferenceCache.open(path, found), self.trainer.precision)

    def cached_logprobs(self) -> CachedLogprobs | None:
        """The reference's log-probabilities, where they take the reference's place. None: the reference runs itself.

        They do so in training, and wherever the reference is not in memory.
        """
        cache = self._cache or self._cache_found
        if not isinstance(cache, CachedLogprobs):
            return None
        training = self._trainer is not None and self.trainer.training
        return cache if training or self.loaded_models().reference_kind == "policy" else None

    def loaded_models(self) -> PolicyAndReference:
        """The models, which are loaded now if they were given by name and no Trainer has loaded them."""
        if self.models is None:  # an override of `configure_model` may not bear a second call
            self.configure_model()
        assert self.models is not None
        return self.models

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the batch on the CPU, where it is checked and laid out. Only the models' inputs go to the device.

        A dict becomes a UserDict, because DDP and FSDP move the tensors of every dict among a step's arguments.
        """
        return UserDict(batch) if isinstance(batch, dict) else batch

    def read(self, batch: Mapping[str, Tensor], *, weighted: bool = False) -> Sequences:
        """The sequences of a batch in one of the forms that LitDPO documents.

        Args:
            batch: The batch.
            weighted: Whether pairs of `weight` 0 need no labels.

        Raises:
            TypeError, ValueError: The batch has another form.
        """
        policy = self.loaded_models().policy
        return checked_sequences(
            batch,
            num_embeddings=forward.num_embeddings(policy),
            num_positions=forward.num_positions(policy),
            weighted=weighted,
        )

    def statistics(
        self, sequences: Sequences, whole: Sequences | None = None
    ) -> tuple[SequenceStatistics, Tensor | None]:
        """As `PolicyAndReference.statistics`. Without a reference, all but `WITHOUT_REFERENCE` is NaN.

        With `cached_logprobs`, `reference_logprob` and `log_ratio` are there too.
        """
        models, cached, group = self.loaded_models(), self.cached_logprobs(), None
        if self.context_parallel_size > 1 and self._trainer is not None:
            group = context_group(self.context_parallel_size)
            stage = self.trainer.state.stage
            if stage not in self._same_batches:
                check_same_batch(sequences, group, self.device)
                self._same_batches |= {stage}
        statistics, auxiliary = models.statistics(sequences, whole, alone=cached is not None, group=group)
        if cached is not None:
            logprobs = cached.logprobs(sequences, statistics.policy_logprob.device)
            return with_reference_logprob(of_policy_alone(statistics), logprobs), auxiliary
        return of_policy_alone(statistics) if models.reference_kind == "policy" else statistics, auxiliary

    def check_noise(self, sequences: Sequences) -> None:
        """With `disable_dropout`, keeps other noise out of the policy too, and warns of it, before the first step."""
        if not self._noise_checked and self.hparams["disable_dropout"]:
            keep_noise_out(self.loaded_models().policy, sequences)
        self._noise_checked = True

    def check_start(self, statistics: SequenceStatistics) -> None:
        """Warns if a policy that starts training differs from its reference in the first batch."""
        models = self.loaded_models()
        if not self._start_checked and (models.reference_kind != "policy" or self.cached_logprobs() is not None):
            without_adapter = is_peft(unwrapped(models.policy)) and models.reference is None and models.adapter is None
            warn_unless_policy_is_reference(models.policy, without_adapter, statistics)
        self._start_checked = True

    def configure_callbacks(self) -> list[Callback]:
        """`QuietStart`, unless the Trainer has it from an earlier run."""
        trainer: Any = self.trainer
        return [] if any(isinstance(c, QuietStart) for c in trainer.callbacks) else [QuietStart()]

    def setup(self, stage: str) -> None:
        """Refuses strategies that would train wrong, and averages of other weights."""
        check_context_can_be_shared(self)
        self._same_batches = frozenset()
        if stage == "fit":
            check_backward_is_run(self.trainer)
            check_averages_of_weights(self)
        check_unsharded_with_ddp(self)

    def on_fit_start(self) -> None:
        """Refuses a quantised policy without an adapter, and a strategy under which parameters would drift apart."""
        check_has_adapter(self.loaded_models().policy)
        check_reference_can_be_cached(self)
        check_gradients_are_exchanged(self)

    def on_train_start(self) -> None:
        """With `cache_reference`, runs the reference over all pairs or finds its answers, and frees its layers."""
        path = self.hparams["cache_reference"]
        if path is None:
            return
        models, logprobs = self.loaded_models(), self.hparams["cache_kind"] == "logprobs"
        in_memory = models.reference_kind != "policy"
        reference = (models.policy if models.reference is None else models.reference) if in_memory else None
        unchanged = reference is None or quick_digest(reference) == self._reference_digests.get("weights")
        self._cache = cached_reference(
            path,
            self.trainer,
            reference,
            partial(self.read, weighted=True),
            models.reference_outputs,
            self._cache,
            logprobs=models.reference_logprobs if logprobs else None,
            adapter=models.adapter,
            files=self._reference_files if unchanged else None,
        )
        if isinstance(self._cache, CachedReference):
            kept = None if models.reference is None else self._cache.keep_output_layer(models.reference)
            models.use_recorded(self._cache, kept)
        elif models.reference is not None and (is_sharded(models.reference) or not self.trainer.enable_validation):
            models.forget_reference()
        del reference
        gc.collect()  # save_hyperparameters left frames that hold the reference, and one another
