//! The threads that session actors run on: an actix system and its arbiters, beside tokio's.

use crate::error::Error;
use actix::{Arbiter, System};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// A few single-threaded loops; each actor lives on one of them.
pub struct ActorPool {
    arbiters: Vec<actix::ArbiterHandle>,
    next: AtomicUsize,
    system: System,
}

/// The pool's threads, for who ends them.
pub struct PoolThreads {
    system: System,
    thread: JoinHandle<()>,
}

impl ActorPool {
    /// Starts `n` threads and one that looks after them. A server has its own system, so that it
    /// runs in any tokio runtime and several can run in one process.
    pub async fn start(n: usize) -> Result<(ActorPool, PoolThreads), Error> {
        let (ready, started) = oneshot::channel();
        let body = move || {
            let system = System::new();
            let arbiters: io::Result<Vec<Arbiter>> =
                system.block_on(async move { (0..n).map(|_| Arbiter::try_new()).collect() });
            let arbiters = match arbiters {
                Ok(arbiters) => arbiters,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let handles = arbiters.iter().map(Arbiter::handle).collect();
            if ready.send(Ok((System::current(), handles))).is_err() {
                System::current().stop();
            }
            if let Err(error) = system.run() {
                tracing::error!(%error, "the actor system failed");
            }
            for arbiter in arbiters {
                arbiter.stop();
                if arbiter.join().is_err() {
                    tracing::error!("an actor thread had panicked");
                }
            }
        };
        let name = "actors";
        let failed = |source| Error::Thread { name, source };
        let thread = std::thread::Builder::new().name(name.into()).spawn(body).map_err(failed)?;
        let started = started.await.map_err(|_| Error::Gone { part: name })?;
        let (system, arbiters): (System, Vec<_>) = started.map_err(failed)?;
        let threads = PoolThreads { system: system.clone(), thread };
        Ok((ActorPool { arbiters, next: AtomicUsize::new(0), system }, threads))
    }

    /// Where the next actor goes.
    pub fn arbiter(&self) -> &actix::ArbiterHandle {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        &self.arbiters[next % self.arbiters.len()]
    }
}

impl Drop for ActorPool {
    fn drop(&mut self) {
        self.system.stop();
    }
}

impl PoolThreads {
    /// Ends all actors and their threads. Blocks.
    pub fn join(self) {
        self.system.stop();
        if self.thread.join().is_err() {
            tracing::error!("the thread of the actor system had panicked");
        }
    }
}
