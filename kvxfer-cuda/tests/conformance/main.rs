//! Each transport, held to the contract of [`kvxfer_core::transport`].
//!
//! A transport joins with a [`Bench`](bench::Bench) and one line.

#![expect(unreachable_pub, reason = "a test has no users")]

mod bench;
mod clauses;
#[path = "../common/mod.rs"]
mod common;
mod cuda;
mod model;

/// Runs each clause on a bench of its own, and those that hold for this transport only.
macro_rules! conformance {
    ($transport:ident, $bench:expr $(, $own:ident)*) => {
        conformance!(@ $transport, $bench, [
            an_accepted_post_ends_once_and_is_visible,
            a_refused_post_leaves_no_trace,
            ranges_are_checked_without_overflow,
            a_post_is_checked_before_its_first_byte_moves,
            overlapping_writes_are_refused,
            empty_posts_and_empty_writes_end_well,
            block_sizes_and_alignments,
            the_sum_runs_over_spans_in_order,
            posts_to_two_peers_stay_apart,
            detaching_ends_what_is_under_way_once,
            detaching_one_segment_leaves_the_others,
            attaching_again_replaces,
            malformed_handles_are_refused,
            a_full_queue_can_be_retried,
            a_post_larger_than_the_queue_is_taken_alone,
            random_posts_leave_what_a_model_says,
            $($own,)*
        ]);
    };
    (@ $transport:ident, $bench:expr, [$($clause:ident,)*]) => {
        mod $transport {
            $(
                #[test]
                fn $clause() {
                    let Some(mut bench) = $bench else { return };
                    super::clauses::$clause(&mut bench);
                }
            )*
        }
    };
}

// The calls of `poll` are what moves the bytes of these.
conformance!(local, super::bench::local(), a_small_budget_moves_a_little_and_no_budget_nothing);
conformance!(shm, super::bench::shm(), a_small_budget_moves_a_little_and_no_budget_nothing);
// The decorator does nothing when it is not told to.
conformance!(fault, super::bench::faultless(), a_small_budget_moves_a_little_and_no_budget_nothing);
conformance!(tcp, super::bench::tcp());
// Only where network namespaces can be made.
conformance!(tcp_between_hosts, super::bench::tcp_between_hosts());
// Only where the wheel is.
conformance!(ucx, super::bench::ucx());
// Only where there is a driver, or a stand-in for one.
conformance!(cuda_ipc, super::cuda::posix_fd());
conformance!(cuda_ipc_fabric, super::cuda::fabric());
conformance!(cuda_ipc_legacy, super::cuda::legacy());

mod faults;
