"""Callbacks for trainers: import ``integrations.lightning`` or ``integrations.transformers``, whichever is installed.

Accelerate needs no callback: ``ProximalStep(model, optimizer)`` accepts what ``accelerator.prepare`` returns, and
``accelerator.register_for_checkpointing(prox)`` saves its state.
"""

__all__: list[str] = []
