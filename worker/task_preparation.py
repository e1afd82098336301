"""From an envelope to a task that can run: known kind, installed, valid spec, engine key, folder, limits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
from pydantic import JsonValue, ValidationError

from executors import catalog
from executors.catalog import CatalogEntry
from executors.child_messages import ChildTask, RunTask
from executors.contract import EngineHost, Failure, JsonObject
from executors.errors import BadSpecError, ExecutorError
from executors.input_spec import InputRequest
from executors.task_spec import Destination, Output, TaskSpec, unknown_keys
from orchestrator_client.messages import ChildEnvelope, TaskEnvelope
from orchestrator_client.transfers.http_link import HttpLink
from orchestrator_client.validation_text import validation_text
from worker.delivery_plan import work_digest
from worker.destinations import target_of
from worker.executor_choice import CheckedSpec, ChosenExecutor, ExecutorMask, choose_executor
from worker.results_folder import choose_folder
from worker.settings import Settings, SettingsError

log = structlog.get_logger()


class RejectedError(Exception):
    """The task cannot run here; `failure` is the answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class Folder:
    """Where a task's (or child's) results go.

    Attributes:
        path: the folder on this worker.
        required: files that its sender wants to see in the manifest.
        destination: where they are sent; None: nowhere.
    """

    path: Path
    required: tuple[str, ...]
    destination: Destination | None = None


@dataclass(frozen=True)
class FailedChild:
    """A merged child that cannot run; the others can."""

    failure: Failure
    folder: Folder


@dataclass(frozen=True)
class PreparedTask:
    """A task that can run.

    Attributes:
        order: what the engine gets.
        entry: its kind, and which of that kind's executors runs it.
        engine_key: which engine it needs.
        exclusive: whether that engine tolerates no other of its sort beside it.
        concurrent: whether that engine runs several tasks at once.
        folder: where its results go.
        child_folders: the same for each merged child that can run.
        failed_children: merged children that cannot.
        inputs: what has to be found or fetched before it can run.
        child_inputs: the same for each merged child.
        work: digest of what it computes, if its results are sent somewhere; else empty.
        warnings: sentences for its sender.
        timeout_sec: wall-clock limit; 0 is none.
        no_progress_sec: limit of silence; 0 is none.
    """

    order: RunTask
    entry: CatalogEntry
    engine_key: str
    exclusive: bool
    concurrent: bool
    folder: Folder
    child_folders: dict[str, Folder]
    failed_children: dict[str, FailedChild]
    warnings: list[str]
    timeout_sec: float
    no_progress_sec: float
    inputs: tuple[InputRequest, ...] = ()
    child_inputs: dict[str, tuple[InputRequest, ...]] = field(default_factory=dict)
    work: str = ""

    @property
    def destinations(self) -> dict[str, Destination]:
        """Where results are sent: the task's own, and its children's; those that stay here are left out."""
        folders = {self.order.task_id: self.folder, **self.child_folders}
        folders |= {task_id: child.folder for task_id, child in self.failed_children.items()}
        return {task_id: folder.destination for task_id, folder in folders.items() if folder.destination is not None}

    @property
    def wants_inputs(self) -> bool:
        """Whether anything has to be found or fetched."""
        return bool(self.inputs or self.child_inputs)


@dataclass(frozen=True)
class _RunnableChild:
    task: ChildTask
    folder: Folder
    inputs: tuple[InputRequest, ...]


@dataclass(frozen=True)
class _Children:
    runnable: tuple[_RunnableChild, ...]
    failed: dict[str, FailedChild]


class TaskPreparation:
    """Prepares tasks by the operator's settings.

    Args:
        settings: the settings.
        link: knows which hosts may be called.
        gpus: how many GPUs this worker may use; decides which default model applies, and counts in the choice of
            executors.
    """

    def __init__(self, settings: Settings, link: HttpLink, *, gpus: int) -> None:
        self._settings = settings
        self._link = link
        self._host = EngineHost(gpus=gpus)
        self._mask = ExecutorMask(settings.worker_executor_mask)
        self._default_model = settings.vllm_model if gpus else settings.hf_model
        self._default_model = self._default_model or settings.hf_model or settings.vllm_model

    def kinds(self) -> list[str]:
        """Task types that this worker accepts."""
        return self._mask.kinds()

    def check_mask(self) -> None:
        """Warn of names in WORKER_EXECUTOR_MASK that are neither a kind of task nor an executor.

        Raises:
            SettingsError: no kind of task is left.
        """
        known = self._mask.known()
        if not self.kinds():
            given = ",".join(self._settings.worker_executor_mask)
            raise SettingsError(f"WORKER_EXECUTOR_MASK={given!r} leaves no task type; known are: {known}")
        for name in self._mask.unknown():
            text = "WORKER_EXECUTOR_MASK names an unknown task type or executor"
            log.warning(text, action="start", name=name, known=known)

    def prepare(self, envelope: TaskEnvelope) -> PreparedTask:
        """Check everything that can be checked without loading anything heavy, and choose the executor.

        Raises:
            RejectedError: the task cannot run here.
        """
        chosen = self._choose(envelope)
        executor, spec = chosen.executor, chosen.spec
        try:
            folder, folder_warning = self.folder_for(envelope.task_id, spec.output)
        except ExecutorError as error:
            raise RejectedError(Failure(reason=error.reason, message=error.message, hint=error.hint)) from error
        warnings = unknown_keys(spec)
        if folder_warning:
            warnings.append(folder_warning)
        children = self._children(executor.spec_type, envelope, folder.destination)
        runnable = tuple(child.task for child in children.runnable)
        return PreparedTask(
            order=RunTask(
                task_id=envelope.task_id,
                spec=chosen.sent,
                out_dir=folder.path,
                children=runnable,
                why_this_executor=chosen.why,
            ),
            entry=chosen.entry,
            engine_key=f"{chosen.entry.key}:{executor.engine_key(spec)}",
            exclusive=executor.exclusive,
            concurrent=executor.concurrent,
            folder=folder,
            child_folders={child.task.task_id: child.folder for child in children.runnable},
            failed_children=children.failed,
            inputs=spec.inputs(),
            child_inputs={child.task.task_id: child.inputs for child in children.runnable if child.inputs},
            work=work_digest(chosen.sent, {each.task_id: each.spec for each in runnable}) if folder.destination else "",
            warnings=warnings,
            timeout_sec=spec.timeout_sec or self._settings.worker_task_timeout_sec,
            no_progress_sec=spec.no_progress_timeout_sec or self._settings.worker_no_progress_timeout_sec,
        )

    def _choose(self, envelope: TaskEnvelope) -> ChosenExecutor:
        kind, accepted = envelope.kind, self.kinds()
        offer = f"this worker accepts: {', '.join(accepted)}"
        if not kind:
            raise RejectedError(Failure(reason="bad_spec", message="spec.taskType is missing", hint=offer))
        if kind not in catalog.entries():
            text = f"spec.taskType is {kind!r}: no executor of that name is known here"
            raise RejectedError(Failure(reason="unknown_task_type", message=text, hint=offer, retryable=True))
        if kind not in accepted:
            text = f"spec.taskType is {kind!r}: switched off on this worker by WORKER_EXECUTOR_MASK"
            raise RejectedError(Failure(reason="executor_disabled", message=text, hint=offer, retryable=True))

        def check(spec_type: type[TaskSpec]) -> CheckedSpec:
            return self._validate(spec_type, kind, envelope.task.spec, "spec")

        chosen = choose_executor(kind, self._mask, self._host, check)
        if isinstance(chosen, Failure):
            raise RejectedError(chosen)
        return chosen

    def folder_for(self, task_id: str, output: Output) -> tuple[Folder, str]:
        """Choose where a task's results go (WIRE 5.4), with a warning if it is not where its sender wanted them.

        Raises:
            BadSpecError: they are to be sent to somewhere that this worker does not call.
        """
        settings, destination = self._settings, output.destination
        if destination.type == "http":
            target_of(destination, settings, self._link)  # better refused now than after hours of work
            return Folder(settings.results_dir / task_id, output.artifacts, destination), ""
        path, warning = choose_folder(task_id, destination.path, settings.results_dir, settings.worker_allowed_roots)
        if destination.url and not warning:
            warning = "output.destination.url has no effect without output.destination.type 'http': nothing is sent"
        return Folder(path, output.artifacts), warning

    def default_folder(self, task_id: str) -> Folder:
        """The folder of a task whose spec cannot be read."""
        return Folder(self._settings.results_dir / task_id, ())

    def answer_folder(self, envelope: TaskEnvelope) -> Folder:
        """The folder of a task that cannot run; its destination counts if that much of its spec can be read."""
        folder = self.default_folder(envelope.task_id)
        try:
            output = Output.model_validate(envelope.task.spec.get("output") or {})
            destination = self.folder_for(envelope.task_id, output)[0].destination
        except (ValidationError, ExecutorError):
            return folder
        return replace(folder, destination=destination)

    def _validate(self, spec_type: type[TaskSpec], kind: str, spec: JsonObject, place: str) -> CheckedSpec:
        sent = self._with_default_model(spec) if kind == "inference" else spec
        try:
            return spec_type.model_validate(sent), sent
        except ValidationError as error:
            raise BadSpecError(validation_text(error, place), hint="correct the task file and send it again") from error

    def _with_default_model(self, spec: JsonObject) -> JsonObject:
        """Fill in VLLM_MODEL or HF_MODEL where an inference task names no model, nor a checkpoint (WIRE 4.1)."""
        checkpoint = spec.get("checkpoint")
        if self._default_model is None or (isinstance(checkpoint, dict) and checkpoint.get("load")):
            return spec
        model = spec.get("model") or {}
        source: JsonValue = (model.get("source") or {}) if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(source, dict) or source.get("identifier"):
            return spec
        return {**spec, "model": {**model, "source": {**source, "identifier": self._default_model}}}

    def _children(
        self, spec_type: type[TaskSpec], envelope: TaskEnvelope, destination: Destination | None
    ) -> _Children:
        runnable: list[_RunnableChild] = []
        failed: dict[str, FailedChild] = {}
        seen = {envelope.task_id}
        for child in _merged(envelope):
            if child.task_id in seen:
                text = f"merged_children: the task_id {child.task_id!r} occurs twice"
                raise RejectedError(Failure(reason="bad_spec", message=text, hint="give each task its own id"))
            seen.add(child.task_id)
            try:
                if child.spec is None:
                    raise BadSpecError(f"merged_children: the spec of {child.task_id} is missing")
                spec, sent = self._validate(
                    spec_type, envelope.kind, child.spec, f"merged_children[{child.task_id}].spec"
                )
                folder, _ = self.folder_for(child.task_id, spec.output)
            except ExecutorError as error:
                failure = Failure(reason=error.reason, message=error.message, hint=error.hint)
                # An orchestrator shows the parent's answers for a child that sends nothing (WIRE 5.5).
                folder = replace(self.default_folder(child.task_id), destination=destination)
                failed[child.task_id] = FailedChild(failure, folder)
                continue
            task = ChildTask(task_id=child.task_id, spec=sent, out_dir=folder.path)
            runnable.append(_RunnableChild(task, folder, spec.inputs()))
        return _Children(tuple(runnable), failed)


def _merged(envelope: TaskEnvelope) -> tuple[ChildEnvelope, ...]:
    """The merged children under any of their names (WIRE 3)."""
    if envelope.merged_children or not isinstance(envelope.task.merge_children, list):
        return envelope.merged_children
    try:
        return tuple(ChildEnvelope.model_validate(child) for child in envelope.task.merge_children)
    except ValidationError as error:
        message = validation_text(error, "task.merge_children[…]")
        raise RejectedError(Failure(reason="bad_spec", message=message)) from error
