"""Attachment of a router for whole inputs to a model, by hooks at the modules through which inputs enter."""

from torch import nn

from .input_router import ROUTER_NAME, InputRouter
from .routed import routed_layers


def router_of(model: nn.Module) -> InputRouter | None:
    """The router for whole inputs of an upscaled model; None where each token is routed."""
    router = getattr(model, ROUTER_NAME, None)
    return router if isinstance(router, InputRouter) else None


def attach_router(model: nn.Module, router: InputRouter) -> None:
    """Have a router choose the experts of all routed layers; it becomes the submodule ``smile_router``."""
    for layer in routed_layers(model).values():
        layer.__dict__["input_router"] = router  # not as a submodule of each layer
    for module in entry_points(model):
        module.register_forward_pre_hook(router.begin_call, with_kwargs=True)
        module.register_forward_hook(router.end_call, always_call=True)
    setattr(model, ROUTER_NAME, router)


def detach_router(model: nn.Module) -> None:
    """Remove the router for whole inputs from a model, if it has one."""
    for module in model.modules():
        module.__dict__.pop("input_router", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), InputRouter):
                    del hooks[key]
    model._modules.pop(ROUTER_NAME, None)


def entry_points(model: nn.Module) -> list[nn.Module]:
    """The modules through which inputs enter a model, from the outside in.

    These are the model, or the encoder of an encoder-decoder, and the modules that wrap all of its routed layers, such
    as the vision model inside a vision tower: some callers use only the inner one.
    """
    layers = list(routed_layers(model))
    root, prefix = model, ""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
        name = next(name for name, module in model.named_modules() if module is encoder)
        if any(layer.startswith(f"{name}.") for layer in layers):
            root, prefix = encoder, f"{name}."
    paths = [layer.removeprefix(prefix).split(".")[:-1] for layer in layers if layer.startswith(prefix)]
    modules, current = [root], root
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        current = current.get_submodule(parts[0])
        if type(current).forward is not nn.Module.forward:  # a list has none
            modules.append(current)
    return modules
