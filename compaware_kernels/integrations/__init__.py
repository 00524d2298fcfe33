"""Callbacks for trainers: ``integrations.lightning`` and ``integrations.transformers``, each imported by its own name.

Accelerate needs none: ``ProximalStep(model, optimizer)`` takes what ``accelerator.prepare`` returns, and
``accelerator.register_for_checkpointing(prox)`` saves its state.
"""
