//! Forwards of any sessions in one pass over their packed rows: microbatches, and the next tokens of
//! sequences that go on from their caches.

use super::caches::{Asks, CacheKey};
use super::command::{Command, ForwardResult, FrameWork, Job, Reply};
use super::company::Company;
use super::outcome::{caught, send, together_or_alone};
use super::tapes::{LoraShape, Need, NewTape, Packing};
use super::wire;
use super::worker::Worker;
use crate::error::Error;
use crate::faults::Fault;
use crate::ledger::{Reservation, Shortage};
use crate::quota::{Account, Amount, Held};
use crate::scheduler::{Kind, LaneId, Scheduler, Taken};
use crate::session::{ExtendWork, ForwardWork, Mode};
use crate::trace::{self, BatchSpan};
use offshoot_model::{DropoutKey, Rows, Segment, Tape, TapeSize, Way, Work};
use offshoot_proto::HostTensor;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Tensor;

/// When a client whose Forward found no room should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A forward of the next pass.
struct Chosen {
    taken: Taken<Job>,
    /// None: evaluation, or a cache.
    keep: Option<TapeSize>,
    /// Of its tape, in its tenant's account.
    of_tenant: Option<Held>,
}

/// What a pass gave one job.
struct Done {
    hidden: HostTensor,
    tape: Option<Tape>,
}

/// What a forward is of.
#[derive(Clone, Copy)]
enum Asked<'a> {
    Microbatch(&'a ForwardWork),
    Next(&'a ExtendWork),
}

impl Asked<'_> {
    /// `[N, H]`.
    fn hidden(&self) -> &HostTensor {
        match self {
            Asked::Microbatch(forward) => &forward.hidden,
            Asked::Next(extend) => &extend.hidden,
        }
    }

    fn n_tokens(&self) -> usize {
        self.hidden().shape()[0]
    }

    fn packing(&self) -> Packing {
        match self {
            Asked::Microbatch(forward) => Packing::of(forward),
            Asked::Next(extend) => {
                let (start, n) = (extend.start as i64, self.n_tokens());
                let position_ids = (start > 0).then(|| (start..start + n as i64).collect());
                Packing { seq_lens: vec![n], position_ids }
            }
        }
    }
}

impl Chosen {
    fn asked(&self) -> Asked<'_> {
        asked(&self.taken).1
    }

    /// Of an Extend.
    fn cache(&self) -> Option<CacheKey> {
        match self.asked() {
            Asked::Microbatch(_) => None,
            Asked::Next(extend) => Some((self.taken.lane, extend.cache)),
        }
    }
}

/// Number and work of a Forward or an Extend.
fn asked(taken: &Taken<Job>) -> (u64, Asked<'_>, &Reply<ForwardResult>) {
    match &taken.entry.job.command {
        Command::Frame { sequence, work: FrameWork::Forward { work, reply } } => {
            (*sequence, Asked::Microbatch(work), reply)
        }
        Command::Frame { sequence, work: FrameWork::Extend { work, reply } } => {
            (*sequence, Asked::Next(work), reply)
        }
        _ => unreachable!("a batch of forwards has nothing else"),
    }
}

fn refuse(taken: Taken<Job>, error: Error) {
    let Command::Frame { work, .. } = taken.entry.job.command else { return };
    if let FrameWork::Forward { reply, .. } | FrameWork::Extend { reply, .. } = work {
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
            let (sequence, asked, reply) = asked(&taken);
            if reply.is_closed() {
                continue;
            }
            if let Err(error) = self.check(lane, sequence, asked) {
                self.refuse(taken, error);
                continue;
            }
            let is_first = chosen.is_empty();
            // Caches are made here, for which there may be no memory.
            match caught("Forward", || Ok(self.fit(lane, asked, need, is_first))) {
                Ok(Ok((keep, with))) => {
                    need = with;
                    let of_tenant = self.of_tenant(lane, asked, keep);
                    chosen.push(Chosen { taken, keep, of_tenant });
                }
                Ok(Err(_)) if !is_first => later.push(taken),
                Ok(Err(shortage)) => match self.must_not_wait(&taken, shortage) {
                    Some(error) => self.refuse_forward(taken, error),
                    None => {
                        self.ledger.press(shortage);
                        later.push(taken);
                    }
                },
                Err(error) => self.refuse_forward(taken, error),
            }
        }
        (chosen, need, later)
    }

    fn check(&self, lane: LaneId, sequence: u64, asked: Asked) -> Result<(), Error> {
        self.check_order(lane, sequence)?;
        if let Asked::Next(extend) = asked {
            self.caches.check(lane, extend)?;
        }
        let Some(account) = self.account(lane) else { return Ok(()) };
        let least = match asked {
            Asked::Microbatch(forward) if forward.mode == Mode::Eval => 0,
            Asked::Microbatch(_) => {
                let of_size = |size| self.tape_bytes(lane, asked, size);
                TapeSize::ALL.into_iter().map(of_size).min().unwrap_or(0)
            }
            Asked::Next(extend) => self.caches.growth(&self.part, lane, extend),
        };
        account.refusal(Amount::OpenBytes, least).map_or(Ok(()), |excess| Err(excess.into()))
    }

    fn account(&self, lane: LaneId) -> Option<&Arc<Account>> {
        self.slots.get(&lane).map(|slot| &slot.account)
    }

    fn tape_bytes(&self, lane: LaneId, asked: Asked, size: TapeSize) -> u64 {
        let adapters = self.slots.get(&lane).map(|slot| &slot.adapters);
        self.part.tape_bytes(asked.n_tokens() as u64, size, adapters)
    }

    /// A tape in its tenant's account. That there is room was checked, and only this thread takes it.
    fn of_tenant(&self, lane: LaneId, asked: Asked, keep: Option<TapeSize>) -> Option<Held> {
        let bytes = self.tape_bytes(lane, asked, keep?);
        Some(self.account(lane)?.count(Amount::OpenBytes, bytes))
    }

    fn refuse(&self, taken: Taken<Job>, error: Error) {
        if let Some(account) = self.account(taken.lane) {
            account.give_tokens_back(taken.entry.n_tokens);
        }
        refuse(taken, error);
    }

    /// After room for it was looked for.
    fn refuse_forward(&mut self, taken: Taken<Job>, error: Error) {
        if let Asked::Next(extend) = asked(&taken).1 {
            self.caches.drop_empty((taken.lane, extend.cache));
        }
        self.refuse(taken, error);
    }

    /// How much of a forward can be kept beside what is chosen already, and what all need then. For
    /// the first, idle caches go and older tapes shrink if they must.
    fn fit(
        &mut self,
        lane: LaneId,
        asked: Asked,
        before: Need,
        is_first: bool,
    ) -> Result<(Option<TapeSize>, Need), Shortage> {
        loop {
            let (fits, asks) = match asked {
                Asked::Next(extend) => {
                    let key = (lane, extend.cache);
                    (self.fit_next(lane, extend, before), Asks::Extend(key))
                }
                Asked::Microbatch(forward) => {
                    (self.fit_microbatch(lane, forward, before, is_first), Asks::Forward(lane))
                }
            };
            match fits {
                Err(_) if is_first && self.caches.drop_idle(Instant::now(), asks) => {}
                fits => return fits,
            }
        }
    }

    /// Takes the bytes of the cache; those of the pass are only looked for.
    fn fit_next(
        &mut self,
        lane: LaneId,
        extend: &ExtendWork,
        before: Need,
    ) -> Result<(Option<TapeSize>, Need), Shortage> {
        let slot = self.slots.get(&lane).expect("the check found it");
        self.caches.make_room(&self.part, lane, extend, &slot.account)?;
        let n_tokens = extend.hidden.shape()[0] as u64;
        let running = self.part.workspace_bytes(n_tokens, Work::Forward)
            + self.part.prefix_bytes(n_tokens, extend.start + n_tokens);
        let need = before.with(Need { running, ..Need::default() });
        self.tapes.check(&self.part, need).map(|()| (None, need))
    }

    fn fit_microbatch(
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
            let left = self.account(lane).and_then(|account| account.left(Amount::OpenBytes));
            for size in TapeSize::ALL {
                // Its tenant has no more: the check found that at least the smallest fits.
                let own = self.tape_bytes(lane, Asked::Microbatch(forward), size);
                if left.is_some_and(|left| own > left) {
                    continue;
                }
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
        let ranks = self.slots.get(&lane).map_or(0, |slot| slot.adapters.ranks());
        let lora = LoraShape { ranks, gradient_bytes: self.gradient_bytes(lane) };
        Need::of(self.part.shapes(), n_tokens, keep, lora)
    }

    /// Why a forward without room is refused at once. None: it may wait.
    fn must_not_wait(&self, taken: &Taken<Job>, shortage: Shortage) -> Option<Error> {
        let adapter = self.slots.get(&taken.lane).map_or(0, |slot| slot.adapters.bytes());
        let own = match asked(taken).1 {
            Asked::Microbatch(_) => adapter,
            // It needs its cache, and nobody else's. Its other ones are its client's choice.
            Asked::Next(_) => adapter + self.caches.bytes_of(taken.lane),
        };
        let most = self.ledger.most(shortage.kind).unwrap_or(u64::MAX);
        let never = own + shortage.need > most;
        // The session's own backward may stand behind it: both would wait for each other.
        let blocks_itself = self.tapes.has_any(taken.lane);
        let is_over = taken.entry.since.elapsed() >= self.admission_wait;
        let retry_after = (!never).then_some(RETRY_AFTER);
        (never || blocks_itself || is_over).then_some(Error::NoRoom { shortage, retry_after })
    }

    fn run_chosen(&mut self, mut chosen: Vec<Chosen>, reserved: Reservation) {
        let begun = Instant::now();
        let n_tokens: usize = chosen.iter().map(|chosen| chosen.taken.entry.n_tokens).sum();
        let batch = begin_batch(&mut chosen, n_tokens);
        let results =
            batch.run(|| together_or_alone("Forward", &chosen, |some| Ok(self.compute(some))));
        drop(batch);
        let company = Company::new(begun, &self.slots, chosen.iter().map(|chosen| &chosen.taken));
        self.count();
        self.stats.ran_batch(Kind::Forward, company.size());
        let mut opened = Vec::new();
        for (Chosen { taken, of_tenant, .. }, result) in chosen.into_iter().zip(results) {
            let Taken { lane, entry, .. } = taken;
            let times = company.times(&self.slots, lane, entry.since);
            company.count(&mut self.slots, lane, &entry, result.is_ok());
            let _span = entry.job.spans.asked().enter();
            if let (Err(_), Some(account)) = (&result, self.account(lane)) {
                account.give_tokens_back(entry.n_tokens);
            }
            match entry.job.command {
                Command::Frame { sequence, work: FrameWork::Forward { work, reply } } => {
                    let result = result.map(|done| {
                        let tape_bytes = done.tape.as_ref().map_or(0, Tape::bytes);
                        opened.extend(done.tape.zip(of_tenant).map(|(tape, of_tenant)| NewTape {
                            of_tenant,
                            key: (lane, work.microbatch),
                            tape,
                            packing: Packing::of(&work),
                            dropout: self.dropout(lane, &work),
                            want_input_grad: work.want_input_grad,
                            gradient_bytes: self.gradient_bytes(lane),
                        }));
                        self.set_applied(lane, sequence);
                        ForwardResult { hidden: done.hidden, tape_bytes, cache_bytes: 0, times }
                    });
                    send(reply, result);
                }
                Command::Frame { sequence, work: FrameWork::Extend { work, reply } } => {
                    let key = (lane, work.cache);
                    let result = result.map(|done| {
                        let cache_bytes = self.caches.advance(key, entry.n_tokens);
                        self.set_applied(lane, sequence);
                        ForwardResult { hidden: done.hidden, tape_bytes: 0, cache_bytes, times }
                    });
                    if result.is_err() {
                        self.caches.drop_empty(key);
                    }
                    send(reply, result);
                }
                _ => {}
            }
        }
        self.tapes.open(reserved, opened);
    }

    fn compute(&self, chosen: &[Chosen]) -> Vec<Result<Done, Error>> {
        let (part, device) = (&self.part, self.part.device());
        self.stats.faults.pass(Fault::Forward);
        let uploading = trace::phase("engine.upload").entered();
        let upload = |chosen: &Chosen| wire::upload(chosen.asked().hidden(), part.kind(), device);
        let x = concat(chosen.iter().map(upload).collect()); // [N, H]
        self.injected_limit(x.size()[0]);
        let packings: Vec<Packing> = chosen.iter().map(|one| one.asked().packing()).collect();
        let packing = Packing::concat(&packings.iter().collect::<Vec<_>>());
        let rows = Rows::new(&packing.seq_lens, packing.position_ids.as_deref(), device);
        let mut start = 0;
        let segments: Vec<Segment> = chosen
            .iter()
            .map(|chosen| {
                let rows = start..start + chosen.asked().n_tokens() as i64;
                start = rows.end;
                let lane = chosen.taken.lane;
                let adapter = self.slots.get(&lane).map(|slot| &slot.adapters);
                let dropout = match chosen.asked() {
                    Asked::Microbatch(forward) => self.dropout(lane, forward),
                    Asked::Next(_) => None,
                };
                Segment { rows, adapter, dropout }
            })
            .collect();
        let way = |chosen: &Chosen| {
            let cache = chosen.cache().and_then(|key| self.caches.get(key));
            cache.map_or(chosen.keep.map_or(Way::Evaluate, Way::Train), Way::Extend)
        };
        let ways: Vec<Way> = chosen.iter().map(way).collect();
        drop(uploading);
        let passing = trace::phase("engine.pass").entered();
        let (y, tapes) = part.forward_mixed(&x, &rows, &segments, &ways);
        drop(passing);
        let _downloading = trace::phase("engine.download").entered();
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

/// The batch begins, and with it the run of each job.
fn begin_batch(chosen: &mut [Chosen], n_tokens: usize) -> BatchSpan {
    let jobs = chosen.iter().map(|chosen| &chosen.taken.entry.job.spans);
    let batch = BatchSpan::begin("forward", n_tokens, jobs);
    for Chosen { taken, keep, .. } in chosen {
        let (job, n_tokens) = (&mut taken.entry.job, taken.entry.n_tokens);
        job.spans.run_in(&batch, job.command.span_name(), n_tokens);
        if let Some(size) = keep {
            job.spans.keeps(tape_name(*size));
        }
    }
    batch
}

fn tape_name(size: TapeSize) -> &'static str {
    match size {
        TapeSize::Full => "full",
        TapeSize::Blocks => "blocks",
        TapeSize::Input => "input",
    }
}

/// Packed one after the other.
pub(super) fn concat(mut parts: Vec<Tensor>) -> Tensor {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(&parts, 0),
    }
}
