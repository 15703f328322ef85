"""Which tests only `make test-all` runs, and which tests run in one worker together."""

import re
from pathlib import Path

# `make test` runs a test of every promise. These tests check the same promise for further families, kinds, formats and settings, or in a
# fresh installation, with a real model or in many processes. A pattern matches from the beginning of a test's name.
FULL = (
    # further families
    r"test_every_check_passed_by_the_base_is_passed_by_the_converted_model\[(?!llama-)",
    r"test_verify_checks_a_checkpoint_in_fresh_processes",
    r"test_empty_weights_load_from_a_checkpoint",
    r"test_a_model_with_images_is_converted_as_a_whole\[mistral3",
    r"test_a_family_without_a_row_is_converted\[exaone4",
    r"test_(an_exact_twin_generates_the_text_of_its_base|a_mixture_generates_the_text_of_whole_forwards)\[(?!.*(gpt2|llama))",
    # further kinds of layers
    r"test_every_kind_passes_through_the_same_engine",
    r"test_every_kind_of_layer_is_exported",
    # real models, fresh installations, clients of their own
    r"test_the_tour_in_the_readme_is_true",
    r"test_a_conversion_of_a_gguf_file_is_verified",
    r"test_every_block_of_a_published_card_runs",
    r"test_the_wheel_converts_the_quickstart_in_an_empty_environment",
    r"test_steering_promotes_the_tokens_of_the_pages",
    r"test_the_logits_are_the_same_without_the_package",
    r"test_code_runs_only_if_it_is_trusted",
    r"test_a_converted_base_is_refused_in_a_fresh_process",
    r"test_a_recipe_can_publish_its_result",
    r"test_list_shows_the_figures_of_cards",
    r"test_from_pretrained_loads_a_repository",
    r"test_a_base_on_the_hub_is_named_by_id_commit_and_licence",
    r"test_a_file_on_the_hub_is_named_by_its_repository",
    r"test_a_model_of_the_hub_is_pinned_to_its_commit",
    r"test_the_held_out_perplexity_is_that_of_its_readme",
    r"test_transformers_serve_answers",
    r"test_a_base_with_code_of_its_own_is_converted",
    r"test_a_dry_run_publishes_nothing",
    r"test_a_cached_checkpoint_loads_without_the_network",
    r"test_a_delta_is_pushed_to_the_hub_and_loaded_from_it",
    r"test_(peft_lora_trains_saves_and_merges|trainer_fine_tunes_a_converted_model)\[(?!gpt2)",
    # several processes
    r"test_variables_of_a_launcher_without_its_processes_are_refused\[(?!LOCAL_RANK)",
    r"test_a_killed_process_ends_the_others_with_one_line",
    r"test_distributed_layers_resume_after_a_kill",
    r"test_a_run_of_one_process_resumes_in_two_that_distribute_its_layers",
    r"test_two_processes_train_the_layers_of_one_even_if_interrupted",
    r"test_two_processes_share_the_joint_stage",
    r"test_an_error_is_reported_once_by_any_number_of_processes",
    # further formats, settings and damages
    r"test_other_opsets_are_exported",
    r"test_large_weights_are_in_a_separate_file",
    r"test_a_preset_of_the_checkpoint_is_part_of_the_graph",
    r"test_wrong_steering_is_found",
    r"test_a_wrong_graph_is_not_written\[(?!other_rows)",
    r"test_an_export_without_data_is_compared_on_held_out_text",
    r"test_the_chat_template_is_exported",
    r"test_a_text_of_too_few_documents_is_replaced_by_the_shipped_one",
    r"test_outputs_that_were_not_exported_are_refused",
    r"test_damaged_side_files_are_refused",
    r"test_the_fuzzer_runs_every_kind_of_input",
    r"test_verify_finds_changed_tensors_and_broken_code",
    r"test_the_dashboard_benchmark_measures_files_and_memory",
    r"test_kernels_equal_the_reference",
    r"test_a_signal_leaves_no_temporary_files\[SIG(KILL|INT|HUP)",
    r"test_a_run_that_was_interrupted_resumes_and_ends_the_same\[2",
    r"test_a_full_disk_is_not_blamed_on_the_verified_checkpoint",
    r"test_verify_without_a_base_names_the_skipped_checks",
    r"test_an_output_in_use_is_refused",
    r"test_an_edited_checkpoint_names_its_edits",
    r"test_a_request_that_fails_once_is_retried\[(429|500)",
    r"test_a_download_that_fails_once_is_retried\[(429|503)",
    r"test_fresh_begins_again_after_any_damage\[(?!no mark)",
    r"test_a_split_that_was_interrupted_is_repeated\[(?!split_log)",
    r"test_sequential_training_learns_the_outputs_of_the_layers_below\[teacher",
    r"test_a_kill_while_a_result_is_replaced_loses_neither\[2",
    r"test_half_precision_and_eight_bits_are_exported",
    r"test_generation_settings_do_not_affect_the_gate",
    r"test_the_json_holds_the_figures_of_a_refused_graph",
    r"test_running_out_of_memory_in_onnxruntime_is_a_one_line_error",
    r"test_shuffled_labels_find_nothing",
    r"test_a_recipe_can_export",
    r"test_every_run_of_a_sweep_equals_the_run_alone",
    r"test_a_sweep_refuses_another_text_and_a_damaged_mark",
    r"test_a_full_disk_is_a_one_line_error_and_the_run_resumes",
    r"test_a_joint_stage_that_was_interrupted_resumes_and_ends_the_same\[6",
    r"test_further_checkpoints_are_compared",
    r"test_random_labels_score_at_chance_with_any_number_of_experts",
)
FULL_FILES = ("test_onnx_clients", "test_real_model", "test_smollm2")

# Tests that share slow fixtures run in one worker. pytest-xdist's mark xdist_group has no effect under pytest 9.2 (xdist 3.8 sets an
# attribute that is no longer read).
_TOGETHER = {
    **dict.fromkeys(("test_onnx_clients", "test_real_model", "test_deltas", "test_dashboard_pages"), "real models"),
    "test_smollm2": "SmolLM2",
}
_BY_FILE = {
    *("test_data", "test_evaluation", "test_kernels", "test_kinds", "test_other_tools", "test_own_families", "test_probe"),
    *("test_token_init", "test_steering_effect", "test_training", "test_onnx_gate"),
}


def is_full(nodeid: str) -> bool:
    """Return whether only `make test-all` runs a test."""
    path, _, name = nodeid.partition("::")
    return Path(path).stem in FULL_FILES or any(re.match(pattern, name.rpartition("::")[2]) for pattern in FULL)


def unmatched(nodeids: list[str]) -> list[str]:
    """Return the patterns that match no test."""
    names = [nodeid.rpartition("::")[2] if "[" not in nodeid else nodeid[nodeid.index("::") + 2 :] for nodeid in nodeids]
    return [pattern for pattern in FULL if not any(re.match(pattern, name) for name in names)]


def group_of(nodeid: str) -> str:
    """Return the group that runs in one worker: the test itself, unless it shares slow fixtures."""
    file = Path(nodeid.split("::", maxsplit=1)[0]).stem
    if file == "test_families" and (of := re.search(r"by_the_converted_model\[(\w+)-", nodeid)):
        return f"family {of[1]}"
    return _TOGETHER.get(file, file if file in _BY_FILE else nodeid)
