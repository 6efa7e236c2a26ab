"""Tensors on the devices of a `Machine`: what torch does with them goes into the queue of the current stream.

A tensor has its memory on the CPU, in a block of `DeviceMemory`. Its shape is known at once, by torch's own meta
functions; its values are there when the queue has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_sim.memory import DeviceMemory, Holder, PinnedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.cuda_sim.device import Machine, Queue

    Operator = Any

aten = torch.ops.aten


class World:
    """A machine, its memory, and the tensors in it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = DeviceMemory(machine)
        self.pinned = PinnedMemory()

    def empty(self, device: int, size: Iterable[int], stride: Iterable[int], dtype: torch.dtype) -> CudaTensor:
        """An uninitialised tensor."""
        size, stride = tuple(size), tuple(stride)
        length = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        holder = self.memory.allocate(device, length * dtype.itemsize)
        inner = torch.empty(0, dtype=dtype).set_(holder.block.memory.untyped_storage(), 0, size, stride)
        return CudaTensor(self, inner, holder)

    def like(self, device: int, meta: torch.Tensor) -> CudaTensor:
        """An uninitialised tensor as a meta tensor describes it."""
        return self.empty(device, meta.size(), meta.stride(), meta.dtype)

    def at_address(self, address: int, size: int, owner: object) -> CudaTensor:
        """The bytes at an address that cudaMalloc or CUDA IPC gave; `owner` lives as long as they are referred to."""
        block, offset = self.memory.find_raw(address)
        return CudaTensor(self, block.memory[offset : offset + size], Holder(block, owner))

    def index_of(self, device: torch.device) -> int:
        """The number of a CUDA device; one without a number is the calling thread's current one."""
        index = self.machine.current_device if device.index is None else device.index
        if not 0 <= index < self.machine.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device} of {self.machine.devices})")
        self.machine.touch(index)
        return index


class Description(NamedTuple):
    """What a tensor looks like."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockStorage:
    """What tests and code ask of a tensor's storage."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def nbytes(self) -> int:
        """Bytes of all tensors in it."""
        return self._holder.block.size

    def data_ptr(self) -> int:
        """Its address."""
        return self._holder.block.memory.data_ptr()


class CudaTensor(torch.Tensor):
    """A tensor on a fake device. inner: its memory, which nothing but queued work may touch."""

    world: World
    inner: torch.Tensor  # type: ignore[assignment]
    holder: Holder

    @staticmethod
    def __new__(cls: type[CudaTensor], world: World, inner: torch.Tensor, holder: Holder) -> CudaTensor:
        tensor: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cuda", holder.block.device),
        )
        tensor.world, tensor.inner, tensor.holder = world, inner, holder
        return tensor

    def __init__(self, world: World, inner: torch.Tensor, holder: Holder) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        world = next(leaf.world for leaf in _leaves((args, kwargs)) if isinstance(leaf, CudaTensor))
        return Dispatcher(world).call(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tensor of the fake device is not pickled: take .cpu() first")

    @property
    def device_index(self) -> int:
        """The number of its device."""
        return self.holder.block.device

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy: use .cpu() first")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return BlockStorage(self.holder)

    def record_stream(self, stream: Any) -> None:
        if not self.holder.block.is_foreign:
            self.holder.block.used_on.add(stream.queue)

    def share_memory_(self) -> Any:
        raise RuntimeError("CUDA IPC by torch is not part of the fake")


class FakeCudaMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sends what makes tensors on a device, and what asks for pinned memory, to the fake. One for each thread."""

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world = world

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Dispatcher(self.world).call(func, args, kwargs or {})


class Dispatcher:
    """One operator's call."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.machine = world.machine

    def call(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            # What `.to("cuda")` comes down to: the guard that torch has here is that of meta devices, and torch asks it
            # for the number that is missing. Nobody here moves a tensor to meta.
            kwargs = {**kwargs, "device": torch.device("cuda")}
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, CudaTensor)]
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        is_asked = device is not None and device.type == "cuda"
        if not tensors and not is_asked:
            return self._on_the_cpu(func, args, kwargs)
        self.world.memory.collect()
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if tensors:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        if device is not None and not is_asked:
            return self._on_the_cpu(func, _map(_as_empty_cpu, args), kwargs)
        if any(argument.alias_info is not None and not argument.alias_info.is_write for argument in _returns(func)):
            return self._view(func, args, kwargs)
        index = self._common_device(tensors) if device is None else self.world.index_of(device)
        if not tensors or func in FACTORIES:
            return self._make(func, args, kwargs, index)
        if self._depends_on_values(func, args, kwargs):
            return self._compute_now(func, args, kwargs, index)
        return self._queue(func, args, kwargs, index)

    def _on_the_cpu(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What concerns no device; pinned memory is known here."""
        if func is aten.is_pinned.default:
            return self.world.pinned.has(args[0])
        with torch._C._DisableTorchDispatch():
            if func is aten._pin_memory.default:
                copy = self.world.pinned.make(torch.empty_like(args[0], memory_format=torch.contiguous_format))
                self._touch_current()
                return copy.copy_(args[0])
            if kwargs.get("pin_memory"):
                self._touch_current()
                return self.world.pinned.make(func(*args, **{**kwargs, "pin_memory": False}))
            return func(*args, **kwargs)

    def _touch_current(self) -> None:
        # Pinning goes through a context: the current device's.
        self.machine.touch(self.machine.current_device)

    def _common_device(self, tensors: list[CudaTensor]) -> int:
        indices = {tensor.device_index for tensor in tensors}
        if len(indices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:{sorted(indices)}")
        return indices.pop()

    def _depends_on_values(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func in INDEXING:
            return any(isinstance(index, torch.Tensor) and index.dtype in MASKS for index in args[1])
        return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags

    def _view(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same memory seen otherwise: nothing to queue."""
        base = args[0]
        with torch._C._DisableTorchDispatch():
            seen = func(*_map(_inner, args), **_map(_inner, kwargs))
        # Inside inference mode the view of an ordinary tensor is an ordinary tensor.
        with torch.inference_mode(base.is_inference()):
            return _map(lambda x: CudaTensor(self.world, x, base.holder) if isinstance(x, torch.Tensor) else x, seen)

    def _make(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        """A new tensor of values that the host knows, or of none."""
        described = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
        if func in EMPTY:
            if "device" not in kwargs and not any(argument.name == "device" for argument in func._schema.arguments):
                described = dict(kwargs)
            with torch._C._DisableTorchDispatch():
                meta = func(*_map(_as_meta, args), **described)
            return self.world.like(index, meta)
        with torch._C._DisableTorchDispatch():
            values = func(*_map(_as_empty_cpu, args), **{**described, "device": torch.device("cpu")})
        out = self.world.like(index, values)
        inner = out.inner
        self.machine.launch(self.machine.current_queue(index), str(func), _copying(inner, values))
        return out

    def _compute_now(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        """What the host must see the values for, so that it waits."""
        queue = self.machine.current_queue(index)
        args, kwargs = self._host_arguments(func, args, kwargs, index)
        self.machine.wait([queue.end], "value")
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            values = func(*_map(_inner, args), **_map(_inner, kwargs))

        def give(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            out = self.world.like(index, value)
            # In its turn: what becomes of the memory's last use may still be to come.
            self.machine.launch(queue, str(func), _copying(out.inner, value))
            return out

        with torch._C._DisableTorchDispatch():
            return _map(give, values)

    def _queue(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Any:
        """A kernel on the current stream of the device."""
        queue = self.machine.current_queue(index)
        args, kwargs = self._host_arguments(func, args, kwargs, index)
        inner_args, inner_kwargs = _map(_inner, args), _map(_inner, kwargs)
        if any(argument.alias_info is not None for argument in _returns(func)) or not _returns(func):
            self.machine.launch(queue, str(func), lambda: func(*inner_args, **inner_kwargs))
            return _written(func, args, kwargs)
        outs = [
            self.world.empty(index, *each) if isinstance(each, Description) else each
            for each in self._describe(func, args, kwargs)
        ]
        inners = [out.inner if isinstance(out, CudaTensor) else None for out in outs]

        def run() -> None:
            values = func(*inner_args, **inner_kwargs)
            for inner, value in zip(inners, _leaves(values), strict=True):
                if inner is not None:
                    inner.copy_(value)

        self.machine.launch(queue, str(func), run)
        returns = _returns(func)
        if len(returns) > 1:
            return tuple(outs)
        return outs if isinstance(returns[0].type, torch.ListType) else outs[0]

    def _describe(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What an operator's results look like, by torch's meta functions; they are slow, so what they said is kept."""
        key = (func, _key((args, kwargs)))
        if key not in DESCRIBED:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                results = func(*_map(_as_meta, args), **_map(_as_meta, kwargs))
            DESCRIBED[key] = [
                Description(tuple(each.size()), each.stride(), each.dtype) if isinstance(each, torch.Tensor) else each
                for each in _leaves(results)
            ]
        return DESCRIBED[key]

    def _host_arguments(
        self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], index: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tensors of the host among the arguments: scalars are read now, indices go over, others are refused."""

        def take(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
                return value
            if value.device.type == "meta":
                return value
            if value.dim() == 0:
                return value.clone()
            if func in INDEXING:
                self.machine.wait([self.machine.current_queue(index).end], "copy")
                return value.clone()
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and cuda:{index}: {func}")

        with torch._C._DisableTorchDispatch():
            taken: tuple[tuple[Any, ...], dict[str, Any]] = _map(take, (args, kwargs))
        return taken

    # Copies.

    def copy(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`copy_`, between any two devices."""
        target, source = args[:2]
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if not isinstance(source, torch.Tensor):
            return self._queue(aten.fill_.Scalar, (target, source), {}, target.device_index)
        if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
            self._between_devices(target, source)
        elif isinstance(target, CudaTensor):
            self._to_device(target, source, non_blocking=non_blocking)
        else:
            self._to_host(target, cast("CudaTensor", source), non_blocking=non_blocking)
        return target

    def to_copy(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`_to_copy`: a new tensor of another device, dtype or layout."""
        source: torch.Tensor = args[0]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source.device
        dtype = kwargs.get("dtype") or source.dtype
        non_blocking = bool(kwargs.get("non_blocking"))
        with torch._C._DisableTorchDispatch():
            layout = torch.empty_like(
                _as_meta(source), dtype=dtype, memory_format=kwargs.get("memory_format") or torch.preserve_format
            )
        if device.type == "meta":
            return layout
        if device.type == "cuda":
            out: torch.Tensor = self.world.like(self.world.index_of(device), layout)
        else:
            with torch._C._DisableTorchDispatch():
                out = torch.empty_strided(layout.size(), layout.stride(), dtype=dtype)
                if non_blocking or kwargs.get("pin_memory"):
                    # So does torch where it must not wait.
                    self.world.pinned.make(out)
        return self.copy(func, (out, source, non_blocking), {})

    def _between_devices(self, target: CudaTensor, source: CudaTensor) -> None:
        there, here = self.machine.current_queue(target.device_index), self.machine.current_queue(source.device_index)
        to, of = target.inner, source.inner
        if there is here:
            self.machine.launch(here, "copy", _copying(to, of))
            return
        # torch copies on the source's stream, after the target's, which then waits for it.
        self.machine.launch(here, "wait for the target", after=there.end)
        done = self.machine.launch(here, "copy between devices", _copying(to, of))
        self.machine.launch(there, "wait for the copy", after=done)

    def _to_device(self, target: CudaTensor, source: torch.Tensor, *, non_blocking: bool) -> None:
        queue = self.machine.current_queue(target.device_index)
        to = target.inner
        is_plain = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        with torch._C._DisableTorchDispatch():
            is_read_later = non_blocking and is_plain and self.world.pinned.has(source)
            of = source if is_read_later else source.clone()
        done = self.machine.launch(queue, "copy to the device", _copying(to, of))
        if not non_blocking:
            self.machine.wait([done], "copy")
        elif not is_read_later:
            self.machine.note("staged", target.device_index)

    def _to_host(self, target: torch.Tensor, source: CudaTensor, *, non_blocking: bool) -> None:
        queue = self.machine.current_queue(source.device_index)
        of = source.inner
        is_plain = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        done = self.machine.launch(queue, "copy to the host", _copying(target, of))
        with torch._C._DisableTorchDispatch():
            is_later = non_blocking and is_plain and self.world.pinned.has(target)
        if not is_later:
            self.machine.wait([done], "copy")

    def value(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`item()` and what comes down to it."""
        source: CudaTensor = args[0]
        queue: Queue = self.machine.current_queue(source.device_index)
        self.machine.wait([queue.end], "value")
        with torch._C._DisableTorchDispatch():
            return source.inner.item()

    def never_pinned(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A device's memory is not pinned."""
        return False

    def refuse(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What would take memory from under a tensor."""
        raise NotImplementedError(f"the fake device has no {func}")


SPECIAL: dict[Operator, Callable[[Dispatcher, Operator, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.copy_.default: Dispatcher.copy,
    aten._to_copy.default: Dispatcher.to_copy,
    aten._local_scalar_dense.default: Dispatcher.value,
    aten.is_pinned.default: Dispatcher.never_pinned,
    aten.set_.source_Storage: Dispatcher.refuse,
    aten.set_.source_Tensor: Dispatcher.refuse,
    aten.resize_.default: Dispatcher.refuse,
}
MASKS = (torch.bool, torch.uint8)
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
FACTORIES = {
    *EMPTY,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}


DESCRIBED: dict[Any, list[Any]] = {}


def _leaves(value: Any) -> list[Any]:
    """All that lies in tuples, lists and mappings."""
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [leaf for each in value.values() for leaf in _leaves(each)] if isinstance(value, dict) else [value]


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same tuples, lists and mappings of other things."""
    if isinstance(value, (tuple, list)):
        mapped = [_map(function, each) for each in value]
        # torch's named results are tuples, too.
        return mapped if isinstance(value, list) else tuple(mapped)
    return {name: _map(function, each) for name, each in value.items()} if isinstance(value, dict) else function(value)


def _key(value: Any) -> Any:
    """What the looks of an operator's results depend on."""
    if isinstance(value, (tuple, list)):
        return tuple(_key(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _key(each)) for name, each in value.items())
    if isinstance(value, torch.Tensor):
        return Description(tuple(value.size()), value.stride(), value.dtype), isinstance(value, CudaTensor)
    return type(value), value


def _copying(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    """Work that copies."""

    def run() -> None:
        target.copy_(source)

    return run


def _returns(func: Operator) -> list[Any]:
    returns: list[Any] = func._schema.returns
    return returns


def _written(func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that an operator in place, or with `out`, returns."""
    returned = []
    for result in _returns(func):
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info == result.alias_info:
                returned.append(kwargs[argument.name] if argument.name in kwargs else args[position])
                break
    return returned[0] if len(returned) == 1 else tuple(returned) or None


def _inner(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _as_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and (isinstance(value, CudaTensor) or value.dim()):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) and value.type == "cuda" else value


def _as_empty_cpu(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    return value
