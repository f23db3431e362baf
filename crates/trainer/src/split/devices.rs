//! The replicas beside the leading one, each with a thread of its own, so that all devices compute at
//! once.

use super::replica::Replica;
use crate::TrainError;
use crate::noise::Outgoing;
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use tch::Tensor;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce(&mut Replica) + Send>;

/// A replica on a thread.
pub(super) struct Elsewhere {
    /// None only while it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// Something that is there, or will be.
pub(super) enum Slot<T> {
    Waiting(Pin<Box<dyn Future<Output = T> + Send>>),
    Ready(T),
    /// It was taken.
    Taken,
}

impl Elsewhere {
    /// `number` names the thread.
    pub fn start(mut replica: Replica, number: usize) -> Result<Self, TrainError> {
        let (jobs, to_do) = mpsc::channel::<Job>();
        let thread =
            std::thread::Builder::new().name(format!("device-{number}")).spawn(move || {
                for job in to_do {
                    job(&mut replica);
                }
            });
        let thread = thread.map_err(|source| TrainError::Io { path: "a thread".into(), source })?;
        Ok(Elsewhere { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Jobs run one after the other, in the order in which they were given.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Replica) -> T + Send + 'static,
    ) -> Slot<T> {
        let (done, result) = oneshot::channel();
        let job: Job = Box::new(move |replica| {
            // Whoever asked may have given up.
            let _ = done.send(work(replica));
        });
        self.jobs.as_ref().expect("it is not dropped yet").send(job).expect(ENDED);
        Slot::Waiting(Box::pin(async { result.await.expect(ENDED) }))
    }

    /// What is done from now on to tensors before they are sent.
    pub fn set_outgoing(&self, outgoing: Outgoing) {
        let _ = self.run(move |replica| replica.outgoing = outgoing);
    }

    /// Takes over the parameters of the leading replica: of the bottom's adapter and of the top's.
    pub fn set_parameters(&self, parameters: [Option<Tensor>; 2]) {
        let _ = self.run(move |replica| {
            let _guard = tch::no_grad_guard();
            for (side, values) in
                [&mut replica.bottom, &mut replica.top].into_iter().zip(parameters)
            {
                if let (Some(adapter), Some(values)) = (&mut side.adapter, values) {
                    adapter.set_parameters(&values);
                }
            }
        });
    }
}

const ENDED: &str = "the thread of a device lives as long as the model, unless it has panicked";

impl Drop for Elsewhere {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic was seen by whoever waited for the job.
            let _ = thread.join();
        }
    }
}

impl<T> Slot<T> {
    /// Whether it is there; if not, `context` is woken when it is.
    pub fn is_ready(&mut self, context: &mut Context) -> bool {
        if let Slot::Waiting(future) = self
            && let Poll::Ready(value) = future.as_mut().poll(context)
        {
            *self = Slot::Ready(value);
        }
        matches!(self, Slot::Ready(_))
    }

    /// Whether it was not there yet when it was looked at last.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Slot::Waiting(_))
    }

    /// What is there. Panics if [`Slot::is_ready`] did not say so.
    pub fn take(&mut self) -> T {
        match std::mem::replace(self, Slot::Taken) {
            Slot::Ready(value) => value,
            _ => panic!("a slot is ready before it is emptied"),
        }
    }
}
