//! What becomes of a job: its result, or what went wrong, told to whoever waits.

use super::command::{
    Admitted, BackwardResult, DiscardResult, DropCacheResult, Exported, ForwardResult, Reply,
    StepResult,
};
use crate::error::Error;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Runs a job and sends what comes of it, be it a panic. Whether it was done.
pub(super) fn answer<T: Outcome>(
    reply: Reply<T>,
    job: &'static str,
    run: impl FnOnce() -> Result<T, Error>,
) -> bool {
    send(reply, caught(job, run))
}

/// Runs a job; a panic is an error. But for one that means that the device is lost: it goes on, and
/// ends the thread.
pub(super) fn caught<T>(
    job: &'static str,
    run: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result,
        Err(panic) if is_device_lost(panic_text(&*panic)) => resume_unwind(panic),
        Err(panic) => Err(panicked(job, &*panic)),
    }
}

/// The results of all jobs in one pass. Those that fail there, or come out of it with values that are
/// not finite, run alone, so that nobody suffers from another's.
pub(super) fn together_or_alone<J, T>(
    job: &'static str,
    jobs: &[J],
    pass: impl Fn(&[J]) -> Result<Vec<Result<T, Error>>, Error>,
) -> Vec<Result<T, Error>> {
    let alone = |one: &J| {
        let result = caught(job, || pass(std::slice::from_ref(one)));
        result.and_then(|mut done| done.pop().expect("one result for each job"))
    };
    match caught(job, || pass(jobs)) {
        Err(error) if jobs.len() == 1 => vec![Err(error)],
        Err(_) => jobs.iter().map(alone).collect(),
        Ok(results) if jobs.len() == 1 => results,
        Ok(results) => {
            let both = results.into_iter().zip(jobs);
            both.map(|(result, one)| result.or_else(|_| alone(one))).collect()
        }
    }
}

/// Sends a result. Whether its frame was applied.
pub(super) fn send<T: Outcome>(reply: Reply<T>, result: Result<T, Error>) -> bool {
    let done = result.as_ref().is_ok_and(T::is_done);
    // Nobody waits any more if the session ended meanwhile.
    let _ = reply.send(result);
    done
}

fn panicked(job: &'static str, panic: &(dyn Any + Send)) -> Error {
    let line = panic_text(panic);
    if is_out_of_memory(line) {
        tracing::warn!(job, panic = line, "a job ran out of memory");
        return Error::OutOfMemory { job };
    }
    tracing::error!(job, panic = line, "a job panicked");
    Error::Panic { job, panic: line.into() }
}

/// What a panic says, without the C++ stack that libtorch appends.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
    text.lines().next().unwrap_or_default()
}

/// As CUDA says it: what it calls an inconsistent state, in which every later call fails as well.
fn is_device_lost(text: &str) -> bool {
    const LOST: [&str; 8] = [
        "device-side assert",
        "illegal memory access",
        "illegal instruction",
        "misaligned address",
        "invalid program counter",
        "hardware stack error",
        "unspecified launch failure",
        "uncorrectable",
    ];
    text.contains("CUDA") && LOST.iter().any(|lost| text.contains(lost))
}

/// As libtorch's allocators say it, on the CPU and on CUDA.
fn is_out_of_memory(text: &str) -> bool {
    text.contains("can't allocate memory") || text.contains("out of memory")
}

/// Whether a result means that its frame was applied.
pub(super) trait Outcome {
    fn is_done(&self) -> bool {
        true
    }
}

impl Outcome for Admitted {}
impl Outcome for Exported {}
impl Outcome for ForwardResult {}
impl Outcome for StepResult {}
impl Outcome for DiscardResult {}
impl Outcome for DropCacheResult {}
impl Outcome for offshoot_adapters::AdapterState {}
impl Outcome for BackwardResult {
    fn is_done(&self) -> bool {
        matches!(self, BackwardResult::Done { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[test]
    fn a_panic_is_that_jobs_answer() {
        let (reply, result) = oneshot::channel();
        let done = answer(reply, "Step", || -> Result<StepResult, Error> {
            let shape = [1, 2];
            panic!("no such dimension in {shape:?}\nC++ stack");
        });
        assert!(!done);
        let error = result.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error.label(), "panic");
        let text = error.to_string();
        assert!(text.contains("no such dimension in [1, 2]") && !text.contains("C++"), "{text}");
    }

    #[test]
    fn a_lost_device_is_no_jobs_answer() {
        let lost = "CUDA error: device-side assert triggered\nC++ stack";
        let ends = catch_unwind(|| caught("Forward", || -> Result<(), Error> { panic!("{lost}") }));
        assert_eq!(panic_text(&*ends.unwrap_err()), "CUDA error: device-side assert triggered");
        let passing = "CUDA error: invalid configuration argument";
        let error = caught("Forward", || -> Result<(), Error> { panic!("{passing}") }).unwrap_err();
        assert_eq!(error.label(), "panic");
    }

    #[test]
    fn out_of_memory_is_told_apart() {
        let huge = || Ok(tch::Tensor::empty([1 << 55], (tch::Kind::Float, tch::Device::Cpu)));
        let error = caught("Forward", huge).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { job: "Forward" }), "{error}");
    }
}
