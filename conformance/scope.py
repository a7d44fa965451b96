"""Which of transformers' tests are left out, and why; and which failures are documented refusals of the library.

All other tests run. Patterns match test names as a shell matches file names.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

TRAINING = "training and gradients: a streamed model only runs forward passes"
INITIALISATION = "initialisation of new weights: a streamed model has its checkpoint's weights"
LOADING = "how transformers loads incomplete, mismatched or renamed checkpoints, and what it reports about them"
SAVING = "saving and pickling: the weights are already on disk"
RESIZING = "resizing embeddings: streamed weights cannot be changed"
AT_REST = "reads weights outside a forward, where a streamed weight is a placeholder"
DEVICES = "accelerate's device maps and offload, device contexts: the library places weights itself"
FACTS = "parallelism plans and other facts about the class, which do not depend on its weights"
COMPILE = "compile and export: streamed weights are not in memory when the compiler reads them"
FLASH = "flash and flex attention, kernels: need an accelerator"
OTHER_MODELS = "for encoder-decoder, vision, audio and composite models: a causal language model has no such parts"
LAYER = "builds only the rotary embedding, not a model"
TESTER = "checks the sizes of the tester's own configs"

OUT_OF_SCOPE: tuple[tuple[str, str], ...] = (
    ("test_training*", TRAINING),
    ("test_*gradient_checkpointing*", TRAINING),
    ("test_enable_input_require_grads*", TRAINING),
    ("test_retain_grad_*", TRAINING),
    ("test_can_init_all_missing_weights", INITIALISATION),
    ("test_init_weights_*", INITIALISATION),
    ("test_all_tensors_are_parameter_or_buffer", INITIALISATION),
    ("test_can_be_initialized_on_meta", INITIALISATION),
    ("test_from_pretrained_no_checkpoint", LOADING),
    ("test_correct_missing_keys", LOADING),
    ("test_base_model_prefix_loads_base_weights", LOADING),
    ("test_can_use_safetensors", LOADING),
    ("test_load_save_without_tied_weights", LOADING),
    ("test_model_weights_reload_no_missing_tied_weights", LOADING),
    ("test_*mismatched_shapes", LOADING),
    ("test_reverse_loading_mapping", LOADING),
    ("test_can_load_from_already_mapped_keys", LOADING),
    ("test_torch_save_load", SAVING),
    ("test_resize_*", RESIZING),
    ("test_tied_weights_keys", AT_REST),
    ("test_bc_torch_dtype", AT_REST),
    ("test_*_offload*", DEVICES),
    ("test_can_load_with_*", DEVICES),
    ("test_cannot_load_with_meta_device_context_manager", DEVICES),
    ("test_model_parallelism", FACTS),
    ("test_tp_plan_matches_params", FACTS),
    ("test_tied_head_has_a_tp_plan_entry", FACTS),
    ("test_model_main_input_name", FACTS),
    ("test_generation_tester_mixin_inheritance", FACTS),
    ("test_inherits_generation_mixin", FACTS),
    ("test_format_of_can_record_outputs", FACTS),
    ("test_*compil*", COMPILE),
    ("test_*export*", COMPILE),
    ("test_flash_attn_*", FLASH),
    ("test_flash_attention_*", FLASH),
    ("test_eager_matches_fa?_generate", FLASH),
    ("test_flex_attention_*", FLASH),
    ("test_sdpa_can_dispatch_on_flash", FLASH),
    ("test_kernels_*", FLASH),
    ("test_get_*_features_*", OTHER_MODELS),
    ("test_encoder_decoder_*", OTHER_MODELS),
    ("test_*_multimodal_encoder_outputs*", OTHER_MODELS),
    ("test_attn_implementation_composite_models", OTHER_MODELS),
    ("test_can_set_attention_dynamically_composite_model", OTHER_MODELS),
    ("test_sdpa_can_dispatch_composite_models", OTHER_MODELS),
    ("test_internal_model_config_and_subconfig_are_same", OTHER_MODELS),
    ("test_problem_types", OTHER_MODELS),
    ("test_vision_*", OTHER_MODELS),
    ("test_model_rope_scaling_frequencies", LAYER),
    ("test_num_layers_is_small", TESTER),
    ("test_model_is_small", TESTER),
)

LOOKED_UP = "WeightNotLoadedError: Gemma 4's forward uses the whole embedding matrix, which is read by row"

REPLACED = "CannotResizeError: the embeddings of a streamed model cannot be replaced"
OWN_EXPERTS = "the library's own function computes streamed experts, with grouped_mm's bits: transformers' is not called"

KNOWN_FAILURES: tuple[tuple[str, str], ...] = (
    ("*::test_model_get_set_embeddings", REPLACED),
    ("*::test_eager_matches_batched_and_grouped_inference*", OWN_EXPERTS),
    ("gemma4::test_inputs_embeds", LOOKED_UP),
    ("gemma4::test_generate_*_inputs_embeds*", LOOKED_UP),
)
"""`family::test` patterns, each with its documented refusal. These tests run, and must fail."""


def first_reason(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    """The reason of the first pattern that matches the name."""
    return next((reason for pattern, reason in table if fnmatchcase(name, pattern)), None)


def reason_left_out(test: str) -> str | None:
    """Why the test is out of scope; None if it runs."""
    return first_reason(test, OUT_OF_SCOPE)


def reason_known(family: str, test: str) -> str | None:
    """The documented refusal that makes the test fail; None if it must pass."""
    return first_reason(f"{family}::{test}", KNOWN_FAILURES)
