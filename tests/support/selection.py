"""Which tests `make test` leaves to `make test-all`, and which tests go to one worker together."""

import re
from pathlib import Path

# Every promise keeps a test that `make test` runs. What is here is the same promise for further families, kinds, formats and settings, or
# the same in a fresh installation, with a real model or in many processes. A pattern is matched from the test's name on.
FULL = (
    # further families
    r"test_what_the_base_does_the_converted_model_does\[(?!llama-)",
    r"test_verify_proves_a_checkpoint_in_fresh_processes",
    r"test_empty_weights_and_loading",
    r"test_a_family_without_a_row\[exaone4",
    r"test_(an_exact_twin_writes_what_its_base_writes|a_mixture_writes_what_whole_forwards_give)\[(?!.*(gpt2|llama))",
    # further kinds of layers
    r"test_every_kind_goes_through_the_same_engine",
    r"test_every_kind_of_layer",
    # real models, fresh installations, clients of their own
    r"test_the_tour_in_the_readme_is_true",
    r"test_every_block_of_a_published_card_runs",
    r"test_the_wheel_converts_the_quickstart_in_an_empty_environment",
    r"test_steering_promotes_what_the_pages_say",
    r"test_its_logits_in_a_process_without_the_package",
    r"test_nothing_of_it_runs_unless_it_is_trusted",
    r"test_a_base_that_is_converted_already_is_said_so_in_a_fresh_process",
    r"test_a_recipe_may_publish_its_result",
    r"test_list_shows_what_cards_say",
    r"test_from_pretrained_takes_a_repository",
    r"test_a_base_on_the_hub_is_named_by_id_commit_and_licence",
    r"test_a_model_of_the_hub_is_pinned_to_its_commit",
    r"test_its_held_out_perplexity_is_the_readmes",
    r"test_transformers_serve_answers",
    r"test_a_base_with_code_of_its_own",
    r"test_a_dry_run_publishes_nothing",
    r"test_what_is_cached_loads_without_the_network",
    r"test_a_delta_goes_to_the_hub_and_is_loaded_from_there",
    r"test_(peft_lora|trainer_fine_tunes)\[(?!gpt2)",
    # several processes
    r"test_processes_that_nobody_launched\[(?!LOCAL_RANK)",
    r"test_a_process_that_is_killed_ends_the_others_in_a_line",
    r"test_layers_shared_out_go_on_after_a_kill",
    r"test_a_run_of_one_process_goes_on_in_two_that_share_out_its_layers",
    r"test_two_processes_train_what_one_does_also_when_cut_off",
    r"test_two_processes_share_the_finish",
    r"test_what_is_wrong_is_told_once_whatever_the_number_of_processes",
    # further formats, settings and damages
    r"test_other_opsets",
    r"test_large_weights_lie_in_a_file_of_their_own",
    r"test_a_preset_of_the_checkpoint_is_part_of_the_graph",
    r"test_steering_that_does_something_else_is_found",
    r"test_a_graph_that_does_something_else_is_not_written\[(?!other_rows)",
    r"test_without_data_it_is_compared_on_what_was_held_out",
    r"test_the_chat_template_goes_with_it",
    r"test_a_text_of_too_few_documents_gives_way_to_the_one_that_ships",
    r"test_what_was_not_exported_is_refused",
    r"test_damaged_side_files",
    r"test_some_inputs_of_every_kind",
    r"test_verify_finds_what_is_wrong",
    r"test_the_dashboards_benchmark",
    r"test_kernels_equal_the_reference",
    r"test_a_signal_leaves_nothing_beside_the_output\[SIG(KILL|INT|HUP)",
    r"test_a_run_that_is_cut_off_ends_as_one_that_was_not\[2",
    r"test_a_full_disk_is_no_fault_of_the_checkpoint_that_is_verified",
    r"test_verify_without_a_base_says_what_it_did_not_check",
    r"test_an_output_in_use_is_refused",
    r"test_an_edited_checkpoint_says_so",
    r"test_what_goes_wrong_once_is_tried_again\[(429|500)",
    r"test_a_download_that_fails_once_is_tried_again\[(429|503)",
    r"test_fresh_starts_over_whatever_is_damaged\[(?!no mark)",
    r"test_a_split_that_is_cut_off_is_done_again\[(?!split_log)",
    r"test_sequential_training_learns_what_the_layers_below_produce\[teacher",
    r"test_a_kill_while_a_result_is_replaced_loses_neither\[2",
    r"test_half_precision_and_eight_bits",
    r"test_other_generation_settings_are_no_difference",
    r"test_figures_of_a_refused_graph_are_in_the_json",
    r"test_memory_that_runs_out_in_onnxruntime_is_a_line",
    r"test_shuffled_labels_find_nothing",
    r"test_a_recipe_exports",
    r"test_every_run_of_a_sweep_is_what_it_is_alone",
    r"test_a_sweep_reads_no_other_text_and_no_damaged_mark",
    r"test_a_full_disk_is_a_line_and_the_run_goes_on_afterwards",
    r"test_a_finish_that_was_cut_off_goes_on_and_ends_the_same\[6",
    r"test_checkpoints_to_compare_with",
    r"test_labels_at_random_score_at_chance_however_many_experts_there_are",
)
FULL_FILES = ("test_onnx_clients", "test_real_model")

# Tests that share what takes long to make go to one worker. pytest-xdist's own mark for that, xdist_group, has no effect under pytest 9.2
# (xdist 3.8 sets an attribute that is no longer read).
_TOGETHER = {
    **dict.fromkeys(("test_onnx_clients", "test_real_model", "test_deltas", "test_dashboard_pages"), "real models"),
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
    """Return the group that a test is sent to a worker with: itself, unless it shares what takes long to make."""
    file = Path(nodeid.split("::", maxsplit=1)[0]).stem
    if file == "test_families" and (of := re.search(r"converted_model_does\[(\w+)-", nodeid)):
        return f"family {of[1]}"
    return _TOGETHER.get(file, file if file in _BY_FILE else nodeid)
