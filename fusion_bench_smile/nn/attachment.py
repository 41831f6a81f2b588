"""Attachment of a router for whole inputs to a model, at the modules through which inputs enter."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from .attribution import gathers_tokens, log_token_layers
from .input_router import ROUTER_NAME, InputRouter, Role
from .routed import layers_with_router, routed_layers
from .routing_state import Generation, active_generation, generate_with

# options of ``generate`` with which its first call does not see the whole prompt, or not the whole model
UNSUPPORTED_GENERATION = ("assistant_early_exit", "prefill_chunk_size")


class RoutedForward:
    """The ``forward`` of an entry point, inside of which the routed layers know the inputs of the call.

    It takes the place of the method on the instance, and keeps its signature. Hooks could not end a call that is
    interrupted.
    """

    name = "forward"

    def __init__(self, router: InputRouter, module: nn.Module, role: Role) -> None:
        self.router, self.module, self.role = router, module, role
        self.replaced = module.__dict__.get(self.name)  # of accelerate, for example

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.replaced or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __code__(self) -> Any:  # `torch.export` reads it
        return getattr(type(self.module), self.name).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.router.run(self.module, self.role, self.__wrapped__, args, kwargs)


class RoutedGenerate(RoutedForward):
    """The ``generate`` of a model, in which the experts are chosen once, by the prompt."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if active_generation(self.router) is not None:  # of the same model, as an assistant of itself
            return self.__wrapped__(*args, **kwargs)
        settings = (*args[1:2], kwargs.get("generation_config"), getattr(self.module, "generation_config", None))
        for option in UNSUPPORTED_GENERATION:
            if kwargs.get(option) or any(getattr(setting, option, None) for setting in settings):
                raise RuntimeError(f"{option} needs routing_scope=token: the experts are chosen by the whole prompt")
        prompts = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
        prompt = next((value for value in prompts if isinstance(value, Tensor)), None)
        length = None if self.role == "encoder_decoder" else 1 if prompt is None else prompt.shape[1]
        try:
            with generate_with(Generation(self.router, length)):
                return self.__wrapped__(*args, **kwargs)
        finally:
            self.router.merged_weights.clear()


def router_of(model: nn.Module) -> InputRouter | None:
    """The router for whole inputs of an upscaled model; None where each token is routed."""
    router = getattr(model, ROUTER_NAME, None)
    return router if isinstance(router, InputRouter) else None


def attach_router(model: nn.Module, router: InputRouter) -> None:
    """Have a router choose the experts of all routed layers; it becomes the submodule ``smile_router``."""
    layers = routed_layers(model)
    for layer in layers.values():
        layer.__dict__["input_router"] = router  # not as a submodule of each layer
    gathered = [name for name in layers if gathers_tokens(name)]
    router.token_layers = {layers[name] for name in gathered}
    if gathered:
        log_token_layers(gathered, len(layers))
    scored = layers_with_router(deciding_module(model)).values()
    router.layers = tuple(scored)
    roles = entry_points(model)
    for module, role in roles.items():
        module.__dict__["forward"] = RoutedForward(router, module, role)
    if hasattr(model, "generate"):
        model.__dict__["generate"] = RoutedGenerate(router, model, roles[model])
    setattr(model, ROUTER_NAME, router)


def detach_router(model: nn.Module) -> None:
    """Remove the router for whole inputs from a model, if it has one."""
    for module in model.modules():
        module.__dict__.pop("input_router", None)
        for name in ("forward", "generate"):
            method = module.__dict__.get(name)
            if isinstance(method, RoutedForward):
                del module.__dict__[name]
                if method.replaced is not None:
                    module.__dict__[name] = method.replaced
    model._modules.pop(ROUTER_NAME, None)


def deciding_module(model: nn.Module) -> nn.Module:
    """The outermost entry point that chooses experts: the model, or the encoder of an encoder-decoder."""
    return next(module for module, role in entry_points(model).items() if role != "encoder_decoder")


def entry_points(model: nn.Module) -> dict[nn.Module, Role]:
    """The modules through which inputs enter a model, from the outside in, with their roles.

    These are the model and the modules that wrap all of its routed layers, such as the vision model inside a vision
    tower: some callers use only the inner one. In an encoder-decoder those of the encoder choose the experts.
    """
    encoder = _encoder_of(model)
    if encoder is None:
        return dict.fromkeys(_wrappers(model), cast(Role, "model"))
    outer: dict[nn.Module, Role] = dict.fromkeys(_wrappers(model), cast(Role, "encoder_decoder"))
    return outer | dict.fromkeys(_wrappers(encoder), cast(Role, "encoder"))


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder with routed layers."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    is_part = any(module is encoder for module in model.modules())
    return encoder if is_part and encoder is not model and routed_layers(encoder) else None


def _wrappers(root: nn.Module) -> list[nn.Module]:
    """A module and the modules in it that wrap all of its routed layers."""
    modules, current = [root], root
    for parts in zip(*(name.split(".")[:-1] for name in routed_layers(root)), strict=False):
        if len(set(parts)) > 1:
            break
        current = current.get_submodule(parts[0])
        if type(current).forward is not nn.Module.forward:  # a list has none
            modules.append(current)
    return modules
