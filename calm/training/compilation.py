"""Whether a job's decoder layers can be compiled."""

from transformers import TrainingArguments

from calm.errors import UserError
from calm.training.sharding.settings import is_asked_to_shard

__all__ = ["check_compilation"]


def check_compilation(training: TrainingArguments) -> None:
    """Refuse what ``--torch_compile`` cannot do, and how it would be done another way.

    Raises:
        UserError: another backend or mode, sharded weights, a CPU without a C++ compiler.
    """
    for name in ("torch_compile_backend", "torch_compile_mode"):
        if value := getattr(training, name):
            raise UserError(f"{name}={value!r} has no effect here: pass --torch_compile alone")
    if training.torch_compile and (is_asked_to_shard(training) or training.deepspeed):
        raise UserError(
            "torch_compile compiles layers whose weights are whole; fsdp and deepspeed split them: "
            "pass --torch_compile=false"
        )
    if training.torch_compile and training.device.type == "cpu":
        _check_compiler()


def _check_compiler() -> None:
    """A C++ compiler is there, which torch.compile needs on a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "torch_compile on a CPU needs a C++ compiler, and none is found: install g++ or clang, "
            "name one in the variable CXX, or pass --torch_compile=false"
        ) from error
