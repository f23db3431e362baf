//! Forwards of any sessions in one pass over their packed rows.

use super::command::{Command, ForwardResult, FrameWork, Job, Reply, Times};
use super::outcome::{send, together_or_alone};
use super::tapes::{Need, NewTape, Packing};
use super::wire;
use super::worker::Worker;
use crate::error::Error;
use crate::ledger::{Reservation, Shortage};
use crate::scheduler::{LaneId, Scheduler, Taken};
use crate::session::{ForwardWork, Mode};
use offshoot_model::{DropoutKey, Rows, Segment, Tape, TapeSize, Work};
use std::time::{Duration, Instant};
use tch::Tensor;

/// When a client whose Forward found no room should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A forward of the next pass.
struct Chosen {
    taken: Taken<Job>,
    /// None: evaluation.
    keep: Option<TapeSize>,
}

/// What a pass gave one job.
struct Done {
    hidden: offshoot_proto::HostTensor,
    tape: Option<Tape>,
}

impl Chosen {
    fn work(&self) -> &ForwardWork {
        work(&self.taken).1
    }
}

/// Number and work of a Forward.
fn work(taken: &Taken<Job>) -> (u64, &ForwardWork, &Reply<ForwardResult>) {
    match &taken.entry.job.command {
        Command::Frame { sequence, work: FrameWork::Forward { work, reply } } => {
            (*sequence, work, reply)
        }
        _ => unreachable!("a batch of forwards has nothing else"),
    }
}

fn refuse(taken: Taken<Job>, error: Error) {
    if let Command::Frame { work: FrameWork::Forward { reply, .. }, .. } = taken.entry.job.command {
        send(reply, Err(error));
    }
}

impl Worker {
    /// Runs what there is room for; the rest waits or is refused.
    pub(super) fn run_forwards(&mut self, jobs: Vec<Taken<Job>>, scheduler: &Scheduler<Job>) {
        let (chosen, need, later) = self.choose(jobs);
        let (waits, runs) = (!later.is_empty(), !chosen.is_empty());
        for taken in later {
            scheduler.put_back(taken);
        }
        match self.tapes.reserve(&self.part, need) {
            _ if !runs => {}
            Ok(reserved) => {
                self.run_chosen(chosen, reserved);
                if waits {
                    scheduler.let_go();
                }
            }
            // Somebody else took the room meanwhile.
            Err(_) => chosen.into_iter().for_each(|chosen| scheduler.put_back(chosen.taken)),
        }
        self.tapes.settle(&self.part);
    }

    /// Those that there is room for and what they need, and those that have to wait.
    fn choose(&mut self, jobs: Vec<Taken<Job>>) -> (Vec<Chosen>, Need, Vec<Taken<Job>>) {
        let (mut chosen, mut need) = (Vec::<Chosen>::new(), Need::default());
        let mut later: Vec<Taken<Job>> = Vec::new();
        for taken in jobs {
            let lane = taken.lane;
            let (sequence, forward, reply) = work(&taken);
            if reply.is_closed() {
                continue;
            }
            if let Err(error) = self.check_order(lane, sequence) {
                refuse(taken, error);
                continue;
            }
            match self.fit(lane, forward, need, chosen.is_empty()) {
                Ok((keep, with)) => {
                    need = with;
                    chosen.push(Chosen { taken, keep });
                }
                Err(_) if !chosen.is_empty() => later.push(taken),
                Err(shortage) => match self.must_not_wait(&taken, shortage) {
                    Some(error) => refuse(taken, error),
                    None => {
                        self.ledger.press(shortage);
                        later.push(taken);
                    }
                },
            }
        }
        (chosen, need, later)
    }

    /// How much of a forward can be kept beside what is chosen already, and what all need then. For
    /// the first, older tapes shrink if they must.
    fn fit(
        &mut self,
        lane: LaneId,
        forward: &ForwardWork,
        before: Need,
        is_first: bool,
    ) -> Result<(Option<TapeSize>, Need), Shortage> {
        if forward.mode == Mode::Eval {
            let need = before.with(self.need(lane, forward, None));
            return self.tapes.check(&self.part, need).map(|()| (None, need));
        }
        loop {
            let mut least: Option<Shortage> = None;
            // The largest first: it is the quickest. A smaller tape is no smaller need if its
            // backward, which computes more again, takes more.
            for size in TapeSize::ALL {
                let need = before.with(self.need(lane, forward, Some(size)));
                match self.tapes.check(&self.part, need) {
                    Ok(()) => return Ok((Some(size), need)),
                    Err(short) if least.is_none_or(|l| short.need < l.need) => least = Some(short),
                    Err(_) => {}
                }
            }
            if let Some(least) = least
                && (!is_first || !self.tapes.shrink_one())
            {
                return Err(least);
            }
        }
    }

    fn need(&self, lane: LaneId, forward: &ForwardWork, keep: Option<TapeSize>) -> Need {
        let n_tokens = forward.hidden.shape()[0] as u64;
        let running = self.part.workspace_bytes(n_tokens, Work::Forward);
        let adapters = self.slots.get(&lane).map(|slot| &slot.adapters);
        match keep {
            None => Need { running, ..Need::default() },
            Some(size) => Need {
                tapes: self.part.tape_bytes(n_tokens, size, adapters),
                running,
                standing: self.part.workspace_bytes(n_tokens, Work::Backward(size))
                    + self.gradient_bytes(lane),
            },
        }
    }

    /// Why a forward without room is refused at once. None: it may wait.
    fn must_not_wait(&self, taken: &Taken<Job>, shortage: Shortage) -> Option<Error> {
        let others = self.ledger.usage().now;
        let adapter = self.slots.get(&taken.lane).map_or(0, |slot| slot.adapters.bytes());
        let never = others.weights + adapter + shortage.need > shortage.budget;
        // The session's own backward may stand behind it: both would wait for each other.
        let blocks_itself = self.tapes.has_any(taken.lane);
        let is_over = taken.entry.since.elapsed() >= self.admission_wait;
        let retry_after = (!never).then_some(RETRY_AFTER);
        (never || blocks_itself || is_over).then_some(Error::NoRoom { shortage, retry_after })
    }

    fn run_chosen(&mut self, chosen: Vec<Chosen>, reserved: Reservation) {
        let begun = Instant::now();
        let n_tokens: usize = chosen.iter().map(|chosen| chosen.taken.entry.n_tokens).sum();
        let span = tracing::debug_span!("forward batch", n_jobs = chosen.len(), n_tokens);
        let results =
            span.in_scope(|| together_or_alone("Forward", &chosen, |some| Ok(self.compute(some))));
        let (n_jobs, execute) = (chosen.len(), begun.elapsed());
        let mut opened = Vec::new();
        for (Chosen { taken, .. }, result) in chosen.into_iter().zip(results) {
            let Taken { lane, entry, .. } = taken;
            let queue = begun.saturating_duration_since(entry.since);
            let times = Times { queue, execute, n_jobs, n_tokens };
            let _span = entry.job.span.enter();
            let Command::Frame { sequence, work: FrameWork::Forward { work, reply } } =
                entry.job.command
            else {
                continue;
            };
            let result = result.map(|done| {
                let tape_bytes = done.tape.as_ref().map_or(0, Tape::bytes);
                opened.extend(done.tape.map(|tape| NewTape {
                    key: (lane, work.microbatch),
                    tape,
                    packing: Packing::of(&work),
                    dropout: self.dropout(lane, &work),
                    want_input_grad: work.want_input_grad,
                    gradient_bytes: self.gradient_bytes(lane),
                }));
                self.set_applied(lane, sequence);
                ForwardResult { hidden: done.hidden, tape_bytes, times }
            });
            send(reply, result);
        }
        self.tapes.open(reserved, opened);
    }

    fn compute(&self, chosen: &[Chosen]) -> Vec<Result<Done, Error>> {
        let (part, device) = (&self.part, self.part.device());
        let upload = |chosen: &Chosen| wire::upload(&chosen.work().hidden, part.kind(), device);
        let x = concat(chosen.iter().map(upload).collect()); // [N, H]
        self.injected_limit(x.size()[0]);
        let packings: Vec<Packing> = chosen.iter().map(|one| Packing::of(one.work())).collect();
        let packing = Packing::concat(&packings.iter().collect::<Vec<_>>());
        let rows = Rows::new(&packing.seq_lens, packing.position_ids.as_deref(), device);
        let mut start = 0;
        let segments: Vec<Segment> = chosen
            .iter()
            .map(|chosen| {
                let rows = start..start + chosen.work().hidden.shape()[0] as i64;
                start = rows.end;
                let adapter = self.slots.get(&chosen.taken.lane).map(|slot| &slot.adapters);
                Segment { rows, adapter, dropout: self.dropout(chosen.taken.lane, chosen.work()) }
            })
            .collect();
        let keep: Vec<Option<TapeSize>> = chosen.iter().map(|chosen| chosen.keep).collect();
        let (y, tapes) = part.forward(&x, &rows, &segments, &keep);
        let each = segments.iter().zip(tapes).zip(chosen);
        each.map(|((segment, tape), chosen)| {
            let own = y.narrow(0, segment.rows.start, segment.rows.end - segment.rows.start);
            let hidden = wire::download(&own, self.wire_dtype(chosen.taken.lane));
            match crate::finite::first_bad(&hidden) {
                Some(_) => Err(Error::Overflow { what: "output" }),
                None => Ok(Done { hidden, tape }),
            }
        })
        .collect()
    }

    fn dropout(&self, lane: LaneId, work: &ForwardWork) -> Option<DropoutKey> {
        let slot = self.slots.get(&lane)?;
        let drops = work.mode == Mode::Train && slot.adapters.spec().lora_dropout > 0.0;
        drops.then_some(DropoutKey { seed: slot.seed, microbatch: work.dropout_key })
    }
}

/// Packed one after the other.
pub(super) fn concat(mut parts: Vec<Tensor>) -> Tensor {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(&parts, 0),
    }
}
