"""The faults of the existing Moltis node, and bad input: which tests keep them away.

Each fault is a sentence, with the tests that would fail if it came back.  The list is
held to the tests: each one named here has to exist.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FAULTS = {
    "selecting a node in chat did not route exec": (
        "test_commands_run_on_the_node_of_the_session_and_nowhere_else",
        "test_a_selected_node_that_is_offline_is_an_error_and_not_local",
        "test_nothing_falls_back_to_local",
    ),
    "the unit passed flags that node run refused": (
        "test_the_unit_restarts_for_ever_and_holds_no_parameter",
        "test_the_agent_restarts_for_ever_and_holds_no_parameter",
    ),
    "the node exited 0 on any disconnect": (
        "test_it_comes_back_after_the_connection_breaks",
        "test_a_fault_inside_a_message_s_handler_does_not_end_the_node",
        "test_a_foreground_node_keeps_trying_until_the_gateway_is_there",
    ),
    "units restarted only on failure": (
        "test_systemd_starts_a_node_that_was_killed_again",
    ),
    "a timeout did not kill the command": (
        "test_a_timeout_ends_the_command",
        "test_the_whole_group_is_ended",
        "test_a_command_whose_time_is_up_is_ended_and_its_output_kept",
    ),
    "commands ran one at a time": (
        "test_commands_run_side_by_side",
        "test_two_nodes_run_six_commands_side_by_side",
    ),
    "commands blocked pings": ("test_commands_run_side_by_side_and_hold_nothing_up",),
    "output was unbounded": (
        "test_collected_output_is_bounded_and_says_what_was_cut",
        "test_a_full_window_pauses_the_command",
        "test_one_who_does_not_read_holds_the_command_up_and_loses_nothing",
    ),
    "output over 512 KiB was dropped in silence": (
        "test_no_frame_exceeds_what_a_moltis_gateway_takes",
        "test_one_who_reads_slowly_gets_all_of_it",
    ),
    "the invoke was sent before it was registered": (
        "test_an_invocation_is_known_and_written_down_before_it_is_sent",
        "test_a_call_is_known_before_it_is_sent",
        "test_a_fast_answer_finds_its_invocation",
    ),
    "pending invokes were not failed on disconnect": (
        "test_pending_invokes_of_a_node_that_cannot_resume_fail_when_it_leaves",
        "test_pending_work_of_a_rust_node_fails_when_it_disconnects",
    ),
    "a second connection with the same id removed the newer one": (
        "test_the_old_connection_ends_before_the_new_one_begins",
        "test_the_same_node_coming_back_replaces_its_old_connection",
    ),
    "node list always printed an empty list": (
        "test_node_list_shows_every_machine_and_local",
    ),
    "disk, runtimes and providers were not shown": (
        "test_a_node_is_listed_with_what_it_has",
        "test_providers_that_were_asked_for_outlast_telemetry_that_names_none",
        "test_telemetry_of_ours_names_runtimes_and_providers",
    ),
    "the list of nodes was not live": (
        "test_events_come_to_those_who_subscribed",
        "test_presence_is_told_when_a_node_comes_and_goes",
    ),
    "a node could sign in as operator": (
        "test_a_node_cannot_make_itself_an_operator",
        "test_a_device_token_opens_nothing_here",
    ),
    "a node could forge events and report for others": (
        "test_a_node_reports_on_itself_only",
        "test_a_node_cannot_answer_for_another",
        "test_a_node_answers_its_own_invocations_only",
    ),
    "wss:// could not work with the self-made certificate": (
        "test_nodes_and_operators_work_over_a_certificate_of_our_own",
        "test_a_node_refuses_a_man_in_the_middle_and_says_so",
    ),
    "tokens stood in argv and world-readable files": (
        "test_node_json_is_kept_in_snake_case_for_its_owner_alone",
        "test_the_copy_is_private_and_compiled",
        "test_gateway_json_is_for_its_owner_alone",
        "test_node_add_takes_an_offer_from_standard_input",
    ),
    "--timeout was not a maximum": (
        "test_no_caller_exceeds_the_nodes_timeout",
        "test_the_node_s_timeout_is_a_maximum",
    ),
    'working_dir:"" failed': (
        "test_an_empty_working_dir_is_none",
        "test_an_empty_cwd_is_the_node_s_working_directory",
    ),
    "renames were forgotten": (
        "test_renames_outlast_what_the_node_calls_itself",
        "test_names_renames_and_telemetry_survive_a_restart",
    ),
}

BAD_INPUT = {
    "a wrong token": ("test_a_wrong_token_is_one_line_and_exit_77",),
    "a gateway that is not there": (
        "test_a_gateway_that_is_not_there_is_one_line_and_exit_69",
        "test_a_foreground_node_keeps_trying_until_the_gateway_is_there",
    ),
    "malformed frames": (
        "test_malformed_messages_of_a_node_get_an_error_and_it_stays",
        "test_bytes_that_are_no_request_do_no_harm",
    ),
    "unknown methods": ("test_an_unknown_method_is_named",),
    "wrong types": (
        "test_connect_with_a_wrong_type_is_refused",
        "test_arguments_that_make_no_sense_are_refused_before_they_travel",
        "test_every_end_has_a_state_whatever_the_node_says",
    ),
    "10 MB of JSON": (
        "test_ten_megabytes_of_json_close_one_connection_and_no_other",
        "test_a_body_says_its_length_which_is_bounded",
    ),
    "100,000 nested brackets": (
        "test_what_is_no_json_of_ours_is_a_value_error",
        "test_a_call_that_makes_no_sense_is_an_error_envelope",
    ),
    "an invoke for an unknown node": (
        "test_an_unknown_node_is_named_with_those_there_are",
    ),
    "a duplicate invoke id": (
        "test_an_id_that_was_used_is_refused",
        "test_one_that_was_asked_twice_runs_once",
    ),
    "two machines with one token": ("test_two_machines_with_one_token",),
    "a node id that belongs to another device": (
        "test_a_node_id_that_belongs_to_another_device_is_refused",
    ),
    "a full disk under the database": (
        "test_a_full_disk_under_the_database_loses_nothing",
        "test_what_leaves_no_trace_does_not_run",
    ),
    "a port in use": ("test_a_port_in_use_is_named",),
    "an unreadable data directory": (
        "test_a_data_directory_that_cannot_be_read_is_named",
        "test_a_data_directory_that_is_a_file_is_named",
    ),
    "a database from a newer version": (
        "test_a_database_of_a_newer_version_is_left_alone",
    ),
}


@pytest.fixture(scope="module")
def all_tests():
    """The names of all tests there are."""
    texts = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("*.py")]
    nodes = [node for text in texts for node in ast.parse(text).body]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", [*FAULTS, *BAD_INPUT])
def test_it_is_kept_away_by_tests_that_exist(fault, all_tests):
    proofs = {**FAULTS, **BAD_INPUT}[fault]
    assert proofs
    assert set(proofs) <= all_tests
