//! Backwards of any sessions in one pass, whatever forwards their tapes come from.

use super::command::{BackwardResult, Command, FrameWork, Job, Reply};
use super::company::Company;
use super::forward::concat;
use super::outcome::{caught, send, together_or_alone};
use super::tapes::{OpenTape, Packing, TapeKey};
use super::wire;
use super::worker::Worker;
use crate::error::Error;
use crate::faults::Fault;
use crate::scheduler::{Kind, Scheduler, Taken};
use crate::session::BackwardWork;
use crate::trace::{self, BatchSpan};
use offshoot_model::{Rows, Segment, Tape, TapeSize, Work};
use offshoot_proto::HostTensor;
use std::time::Instant;
use tch::Tensor;

/// What a pass gave one job, both finite.
struct Done {
    /// For the client, if it wants it.
    grad: Option<HostTensor>,
    /// `[P]`.
    lora: Tensor,
}

/// Number and work of a Backward.
fn work(taken: &Taken<Job>) -> (u64, &BackwardWork, &Reply<BackwardResult>) {
    match &taken.entry.job.command {
        Command::Frame { sequence, work: FrameWork::Backward { work, reply } } => {
            (*sequence, work, reply)
        }
        _ => unreachable!("a batch of backwards has nothing else"),
    }
}

fn key(taken: &Taken<Job>) -> TapeKey {
    (taken.lane, work(taken).1.microbatch)
}

fn refuse(taken: Taken<Job>, error: Error) {
    if let Command::Frame { work: FrameWork::Backward { reply, .. }, .. } = taken.entry.job.command
    {
        send(reply, Err(error));
    }
}

impl Worker {
    /// Runs as many as there is workspace for; there always is for one.
    pub(super) fn run_backwards(&mut self, jobs: Vec<Taken<Job>>, scheduler: &Scheduler<Job>) {
        let mut chosen: Vec<Taken<Job>> = Vec::new();
        let mut later: Vec<Taken<Job>> = Vec::new();
        for taken in jobs {
            let (sequence, _, reply) = work(&taken);
            if reply.is_closed() {
                continue;
            }
            let checked = self.check_order(taken.lane, sequence);
            if let Err(error) = checked.and_then(|()| self.check_shape(&taken)) {
                refuse(taken, error);
                continue;
            }
            match self.make_room(&chosen, &taken) {
                true => chosen.push(taken),
                false => later.push(taken),
            }
        }
        for taken in later {
            scheduler.put_back(taken);
        }
        if !chosen.is_empty() {
            self.run_chosen_backwards(chosen);
        }
        self.tapes.settle(&self.part);
        // Bytes came free.
        scheduler.let_go();
    }

    fn tape(&self, taken: &Taken<Job>) -> Result<&OpenTape, Error> {
        let key = key(taken);
        self.tapes.get(key).ok_or(Error::NoTape { microbatch: key.1 })
    }

    fn check_shape(&self, taken: &Taken<Job>) -> Result<(), Error> {
        let n_tokens = self.tape(taken)?.tape.n_tokens();
        let found = work(taken).1.grad.shape();
        if found[0] as i64 != n_tokens {
            let expected = format!("[{n_tokens}, {}], as its Forward had", found[1]);
            return Err(Error::Shape { field: "grad", found: found.to_vec(), expected });
        }
        Ok(())
    }

    /// Takes the workspace of those chosen and one more.
    fn make_room(&mut self, chosen: &[Taken<Job>], more: &Taken<Job>) -> bool {
        let tapes = chosen.iter().chain([more]).filter_map(|taken| self.tapes.get(key(taken)));
        let (mut n_tokens, mut size, mut gradients) = (0, TapeSize::Full, 0);
        for open in tapes {
            n_tokens += open.tape.n_tokens() as u64;
            size = size.min(open.tape.size());
            gradients += open.gradient_bytes;
        }
        let bytes = self.part.workspace_bytes(n_tokens, Work::Backward(size)) + gradients;
        self.tapes.reserve_running(bytes).is_ok() || chosen.is_empty()
    }

    fn run_chosen_backwards(&mut self, mut chosen: Vec<Taken<Job>>) {
        let begun = Instant::now();
        let n_tokens: usize = chosen.iter().map(|taken| taken.entry.n_tokens).sum();
        let jobs = chosen.iter().map(|taken| &taken.entry.job.spans);
        let batch = BatchSpan::begin("backward", n_tokens, jobs);
        for Taken { entry, .. } in &mut chosen {
            entry.job.spans.run_in(&batch, entry.job.command.span_name(), entry.n_tokens);
        }
        let results =
            batch.run(|| together_or_alone("Backward", &chosen, |some| self.gradients(some)));
        drop(batch);
        let company = Company::new(begun, &self.slots, chosen.iter());
        self.stats.ran_batch(Kind::Backward, company.size());
        for (taken, result) in chosen.into_iter().zip(results) {
            let Taken { lane, entry, .. } = taken;
            let times = company.times(&self.slots, lane, entry.since);
            company.count(&mut self.slots, lane, &entry, result.is_ok());
            let _span = entry.job.spans.asked().enter();
            let Command::Frame { sequence, work: FrameWork::Backward { work, reply } } =
                entry.job.command
            else {
                continue;
            };
            // The tape is used up, whatever comes of it.
            drop(self.tapes.close((lane, work.microbatch)));
            let result = result.and_then(|done| {
                let slot = self.slots.get_mut(&lane).ok_or(Error::Gone { part: "session" })?;
                let grad_norm_squared = caught("Backward", || slot.accumulate(done.lora))?;
                slot.applied = sequence;
                Ok(BackwardResult::Done { grad: done.grad, grad_norm_squared, times })
            });
            send(reply, result.or_else(|error| Ok(BackwardResult::Lost(error))));
        }
    }

    fn gradients(&self, chosen: &[Taken<Job>]) -> Result<Vec<Result<Done, Error>>, Error> {
        let (part, device) = (&self.part, self.part.device());
        self.stats.faults.pass(Fault::Backward);
        let open: Vec<&OpenTape> =
            chosen.iter().map(|taken| self.tape(taken)).collect::<Result<_, _>>()?;
        let uploading = trace::phase("engine.upload").entered();
        let upload = |taken| wire::upload(&work(taken).1.grad, part.kind(), device);
        let grad = concat(chosen.iter().map(upload).collect()); // [N, H]
        self.injected_limit(grad.size()[0]);
        let packing = Packing::concat(&open.iter().map(|open| &open.packing).collect::<Vec<_>>());
        let rows = Rows::new(&packing.seq_lens, packing.position_ids.as_deref(), device);
        let mut start = 0;
        let segments: Vec<Segment> = chosen
            .iter()
            .zip(&open)
            .map(|(taken, open)| {
                let rows = start..start + open.tape.n_tokens();
                start = rows.end;
                let adapter = self.slots.get(&taken.lane).map(|slot| &slot.adapters);
                Segment { rows, adapter, dropout: open.dropout }
            })
            .collect();
        let tapes: Vec<&Tape> = open.iter().map(|open| &open.tape).collect();
        let want_input = open.iter().any(|open| open.want_input_grad);
        drop(uploading);
        let passing = trace::phase("engine.pass").entered();
        let back = part.backward(&tapes, &grad, &rows, &segments, want_input);
        drop(passing);
        let _downloading = trace::phase("engine.download").entered();
        let each = segments.iter().zip(back.lora).zip(open.iter().zip(chosen));
        let done = each.map(|((segment, lora), (open, taken))| {
            // What overflows when squared cannot be clipped by its norm either.
            if !lora.dot(&lora).double_value(&[]).is_finite() {
                return Err(Error::Overflow { what: "LoRA gradient" });
            }
            let input = back.input.as_ref().filter(|_| open.want_input_grad);
            let grad = input.map(|all| {
                let own = all.narrow(0, segment.rows.start, segment.rows.end - segment.rows.start);
                wire::download(&own, self.wire_dtype(taken.lane))
            });
            match grad.as_ref().and_then(crate::finite::first_bad) {
                Some(_) => Err(Error::Overflow { what: "gradient by its input" }),
                None => Ok(Done { grad, lora }),
            }
        });
        Ok(done.collect())
    }
}
