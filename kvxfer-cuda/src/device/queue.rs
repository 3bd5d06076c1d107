//! Tasks from submission to their end. No device here: what is taken from the queue goes to a [`Table`],
//! and comes back as its tasks' sums.
//!
//! Invariants: tasks are taken, and end, in the order in which they were submitted; a task ends when
//! nothing of it is queued and nothing is under way; it is taken only after the events that were to be
//! waited for before it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use kvxfer_core::{Error, ErrorKind, Result};

use super::table::Table;
use super::{Done, Span};

/// The most tasks that have not ended.
const TASKS: usize = 1 << 12;
/// The most spans that were not launched, of all tasks; a task with more is taken when it is alone.
const SPANS: usize = 1 << 16;

/// `E`: an event to wait for.
#[derive(Debug)]
pub(super) struct Queue<E> {
    tasks: VecDeque<Task>,
    /// Number of the first of `tasks`; they are numbered in order.
    first: u64,
    /// Number of the first task with spans that were not taken.
    next: u64,
    /// Not taken, of the tasks from `next` on.
    spans: VecDeque<Span>,
    /// What is to be waited for, in order, and the number of the first task after that.
    waits: VecDeque<(u64, Arc<E>)>,
}

#[derive(Debug)]
struct Task {
    id: u64,
    /// Spans not taken.
    queued: usize,
    /// Launches under way with a part of it.
    launches: u32,
    sum: u64,
    error: Option<Error>,
}

impl<E> Queue<E> {
    pub(super) fn new() -> Self {
        Self {
            tasks: VecDeque::with_capacity(TASKS),
            first: 0,
            next: 0,
            spans: VecDeque::with_capacity(SPANS),
            waits: VecDeque::new(),
        }
    }

    /// How many tasks have not ended.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Adds a task at the end.
    pub(super) fn push(&mut self, id: u64, spans: &[Span]) -> Result<()> {
        let room = self.spans.len() + spans.len() <= SPANS && self.tasks.len() < TASKS;
        if !room && !self.tasks.is_empty() {
            return Err(ErrorKind::PoolFull
                .error(format!(
                    "the GPU's copies are busy with {} tasks, {} spans of which wait",
                    self.tasks.len(),
                    self.spans.len()
                ))
                .fix("poll, then submit again")
                .retry());
        }
        let before = self.spans.len();
        self.spans.extend(spans.iter().filter(|span| span.len > 0));
        let queued = self.spans.len() - before;
        self.tasks.push_back(Task { id, queued, launches: 0, sum: 0, error: None });
        Ok(())
    }

    /// The tasks pushed from now on come after this event.
    pub(super) fn wait_for(&mut self, event: &Arc<E>) {
        let before = self.first + self.tasks.len() as u64;
        // Again, by somebody for whom there was no room after the first time.
        let again = |(task, last): &(u64, Arc<E>)| *task == before && Arc::ptr_eq(last, event);
        if !self.waits.back().is_some_and(again) {
            self.waits.push_back((before, Arc::clone(event)));
        }
    }

    /// An event to wait for before the next [`Queue::take`], which is to be called once this has no more.
    pub(super) fn wait(&mut self) -> Option<Arc<E>> {
        let empty = |queue: &Self| queue.task(queue.next).is_some_and(|task| task.queued == 0);
        while empty(self) {
            self.next += 1;
        }
        if self.spans.is_empty() {
            return None;
        }
        self.waits.pop_front_if(|(task, _)| *task <= self.next).map(|(_, event)| event)
    }

    /// Moves spans, in order, to an empty table, until it is full, none is left, or an event is to be
    /// waited for before the next one. Whether there was any.
    pub(super) fn take(&mut self, table: &mut Table) -> bool {
        let end = self.waits.front().map_or(u64::MAX, |(task, _)| *task);
        'tasks: while self.next < end
            && let Some(task) = self.tasks.get_mut((self.next - self.first) as usize)
        {
            while task.queued > 0 {
                let Some(span) = self.spans.front_mut() else { break };
                let len = table.take(self.next, span);
                if len < span.len {
                    span.skip(len);
                    break 'tasks;
                }
                self.spans.pop_front();
                task.queued -= 1;
            }
            self.next += 1;
        }
        let tasks = table.tasks();
        self.each(tasks.clone(), |_, task| task.launches += 1);
        !tasks.is_empty()
    }

    /// A launch is over: `sums` are what it added to each of these tasks, or why it failed.
    pub(super) fn settle(&mut self, tasks: Range<u64>, sums: Result<&[u64]>) {
        self.each(tasks, |i, task| {
            task.launches = task.launches.saturating_sub(1);
            match &sums {
                Ok(sums) => task.sum = task.sum.wrapping_add(sums.get(i).copied().unwrap_or(0)),
                Err(error) => task.error = Some(error.clone()),
            }
        });
    }

    /// Gives up what was not taken: its tasks end with this error.
    pub(super) fn give_up(&mut self, error: &Error) {
        self.spans.clear();
        self.waits.clear();
        for task in self.tasks.iter_mut().filter(|task| task.queued > 0) {
            task.queued = 0;
            task.error = Some(error.clone());
        }
        self.next = self.first + self.tasks.len() as u64;
    }

    /// Appends what ended.
    pub(super) fn end(&mut self, out: &mut Vec<Done>) {
        while let Some(task) =
            self.tasks.pop_front_if(|task| task.queued == 0 && task.launches == 0)
        {
            self.first += 1;
            self.next = self.next.max(self.first);
            out.push(Done { task: task.id, result: task.error.map_or(Ok(task.sum), Err) });
        }
    }

    fn task(&self, number: u64) -> Option<&Task> {
        self.tasks.get((number - self.first) as usize)
    }

    fn each(&mut self, tasks: Range<u64>, mut f: impl FnMut(usize, &mut Task)) {
        let start = (tasks.start - self.first.min(tasks.start)) as usize;
        let count = (tasks.end - tasks.start) as usize;
        self.tasks.iter_mut().skip(start).take(count).enumerate().for_each(|(i, task)| f(i, task));
    }
}

#[cfg(test)]
mod tests;
