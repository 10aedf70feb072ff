"""The machine below the training code: accelerator, parallel layout, collectives, and Megatron's start-up."""
