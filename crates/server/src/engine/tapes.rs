//! The tapes of all open microbatches, and the bytes that they and the batches take.

use crate::ledger::{BytesKind, Ledger, Reservation, Shortage};
use crate::quota::Held;
use crate::scheduler::LaneId;
use crate::session::ForwardWork;
use offshoot_model::{DropoutKey, Part, Shapes, Tape, TapeSize, Work};
use std::collections::HashMap;
use std::rc::Rc;

/// Names an open microbatch: its session's lane and its own number.
pub(super) type TapeKey = (LaneId, u64);

/// An open microbatch.
pub(super) struct OpenTape {
    pub tape: Tape,
    pub packing: Packing,
    pub dropout: Option<DropoutKey>,
    pub want_input_grad: bool,
    /// What the gradient of its adapter takes while its backward runs.
    pub gradient_bytes: u64,
    /// The bytes of all tapes of its forward: full tapes of one batch share their memory.
    held: Rc<Reservation>,
    /// Its own bytes, in its tenant's account.
    of_tenant: Held,
    /// Order of opening.
    age: u64,
}

/// How a microbatch's rows divide into sequences.
#[derive(Clone)]
pub(super) struct Packing {
    pub seq_lens: Vec<usize>,
    pub position_ids: Option<Vec<i64>>,
}

/// A microbatch as its forward leaves it.
pub(super) struct NewTape {
    pub key: TapeKey,
    pub tape: Tape,
    pub packing: Packing,
    pub dropout: Option<DropoutKey>,
    pub want_input_grad: bool,
    pub gradient_bytes: u64,
    pub of_tenant: Held,
}

/// See the module's text.
pub(super) struct Tapes {
    open: HashMap<TapeKey, OpenTape>,
    ledger: Ledger,
    /// What batches need beside tapes: always enough for the backward of any one open microbatch,
    /// so that every one of them can finish.
    workspace: Reservation,
    n_opened: u64,
}

/// What a forward would take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tapes.
    pub tapes: u64,
    /// While the batch runs.
    pub running: u64,
    /// So that each of its tapes can have its backward alone.
    pub standing: u64,
}

/// What of an adapter a pass's bytes follow from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LoraShape {
    /// The sum of its ranks at all sites.
    pub ranks: u64,
    /// Of one gradient `[P]`.
    pub gradient_bytes: u64,
}

impl Need {
    /// Of a forward of so many rows that keeps such a tape; None: of one in evaluation mode.
    pub fn of(shapes: &Shapes, n_tokens: u64, keep: Option<TapeSize>, lora: LoraShape) -> Need {
        let running = shapes.workspace_bytes(n_tokens, Work::Forward);
        match keep {
            None => Need { running, ..Need::default() },
            Some(size) => Need {
                tapes: shapes.tape_bytes(n_tokens, size, lora.ranks),
                running,
                standing: shapes.workspace_bytes(n_tokens, Work::Backward(size))
                    + lora.gradient_bytes,
            },
        }
    }

    /// Of the workspace.
    pub fn workspace(&self) -> u64 {
        self.running.max(self.standing)
    }

    /// The batch with one more job.
    pub fn with(self, other: Need) -> Need {
        Need {
            tapes: self.tapes + other.tapes,
            running: self.running + other.running,
            standing: self.standing.max(other.standing),
        }
    }
}

impl Tapes {
    pub fn new(ledger: Ledger) -> Self {
        let workspace = ledger.count(BytesKind::Workspace, 0);
        Tapes { open: HashMap::new(), ledger, workspace, n_opened: 0 }
    }

    pub fn len(&self) -> usize {
        self.open.len()
    }

    pub fn get(&self, key: TapeKey) -> Option<&OpenTape> {
        self.open.get(&key)
    }

    /// Whether a session has an open microbatch.
    pub fn has_any(&self, lane: LaneId) -> bool {
        self.open.keys().any(|key| key.0 == lane)
    }

    /// Whether there is room for a forward; if not, what is missing.
    pub fn check(&self, part: &Part, need: Need) -> Result<(), Shortage> {
        let usage = self.ledger.usage();
        let (Some(budget), Some(free)) = (usage.budget, self.ledger.free()) else { return Ok(()) };
        let workspace = need.workspace().max(self.standing(part));
        let (need, free) = (need.tapes + workspace, free + self.workspace.bytes());
        let kind = BytesKind::Tapes;
        if need <= free { Ok(()) } else { Err(Shortage { kind, need, free, budget }) }
    }

    /// Takes the bytes of a forward, or says what is missing.
    pub fn reserve(&mut self, part: &Part, need: Need) -> Result<Reservation, Shortage> {
        let workspace = need.workspace().max(self.standing(part));
        let before = self.workspace.bytes();
        self.workspace.resize(workspace)?;
        let reserved = self.ledger.reserve(BytesKind::Tapes, need.tapes);
        if reserved.is_err() {
            // Less than it was; that always fits.
            let _ = self.workspace.resize(before);
        }
        reserved
    }

    /// Takes the workspace of a backward over so many bytes, or says that it has less.
    pub fn reserve_running(&mut self, bytes: u64) -> Result<(), Shortage> {
        if bytes <= self.workspace.bytes() { Ok(()) } else { self.workspace.resize(bytes) }
    }

    /// Adds what one forward left. Their bytes are given back when all of them are closed.
    pub fn open(&mut self, mut reserved: Reservation, tapes: Vec<NewTape>) {
        // What it takes may be less than expected: a job may have failed.
        let bytes = tapes.iter().map(|new| new.tape.bytes()).sum();
        if reserved.resize(bytes).is_err() {
            tracing::warn!(bytes, reserved = reserved.bytes(), "tapes are larger than expected");
        }
        let held = Rc::new(reserved);
        for new in tapes {
            let age = self.n_opened;
            self.n_opened += 1;
            new.of_tenant.shrink_to(new.tape.bytes());
            let open = OpenTape {
                tape: new.tape,
                packing: new.packing,
                dropout: new.dropout,
                want_input_grad: new.want_input_grad,
                gradient_bytes: new.gradient_bytes,
                held: held.clone(),
                of_tenant: new.of_tenant,
                age,
            };
            self.open.insert(new.key, open);
        }
    }

    pub fn close(&mut self, key: TapeKey) -> Option<OpenTape> {
        self.open.remove(&key)
    }

    /// Drops a session's tapes.
    pub fn forget(&mut self, lane: LaneId) {
        self.open.retain(|key, _| key.0 != lane);
    }

    /// Gives back the workspace that only a running batch needs.
    pub fn settle(&mut self, part: &Part) {
        // Less than it was, unless tapes came: then it was taken with them.
        let standing = self.standing(part);
        if self.workspace.resize(standing).is_err() {
            tracing::warn!(standing, "the workspace of open microbatches is not there");
        }
    }

    /// Makes the tapes of one forward smaller: of those that keep most, the oldest. False: all are
    /// as small as they get.
    pub fn shrink_one(&mut self) -> bool {
        let largest = self.open.values().map(|open| (open.tape.size(), open.age));
        let largest = largest.filter(|(size, _)| *size > TapeSize::Input);
        let Some((size, age)) = largest.max_by_key(|&(size, age)| (size, u64::MAX - age)) else {
            return false;
        };
        let to = match size {
            TapeSize::Full => TapeSize::Blocks,
            TapeSize::Blocks | TapeSize::Input => TapeSize::Input,
        };
        let Some(held) = self.open.values().find(|open| open.age == age).map(|o| o.held.clone())
        else {
            return false;
        };
        let company = self.open.values_mut().filter(|open| Rc::ptr_eq(&open.held, &held));
        let mut company: Vec<&mut OpenTape> = company.collect();
        for open in &mut company {
            open.tape.shrink(to);
            open.of_tenant.shrink_to(open.tape.bytes());
        }
        let bytes = company.iter().map(|open| open.tape.bytes()).sum();
        held.shrink_to(bytes);
        tracing::debug!(?to, bytes, "tapes shrunk for want of room");
        true
    }

    /// Enough for the backward of any one open microbatch.
    fn standing(&self, part: &Part) -> u64 {
        let of_one = |open: &OpenTape| {
            let work = Work::Backward(open.tape.size());
            part.workspace_bytes(open.tape.n_tokens() as u64, work) + open.gradient_bytes
        };
        self.open.values().map(of_one).max().unwrap_or(0)
    }
}

impl Packing {
    /// Of a Forward.
    pub fn of(work: &ForwardWork) -> Packing {
        Packing { seq_lens: work.seq_lens.clone(), position_ids: work.position_ids.clone() }
    }

    fn n_tokens(&self) -> usize {
        self.seq_lens.iter().sum()
    }

    /// Lengths, and position ids where any has its own, of several packed one after the other.
    pub fn concat(all: &[&Packing]) -> Packing {
        let seq_lens = all.iter().flat_map(|packing| packing.seq_lens.iter().copied()).collect();
        let position_ids = all.iter().any(|packing| packing.position_ids.is_some()).then(|| {
            let ids = all.iter().flat_map(|packing| match &packing.position_ids {
                Some(ids) => ids.clone(),
                None => packing.seq_lens.iter().flat_map(|&n| 0..n as i64).collect(),
            });
            ids.collect::<Vec<i64>>()
        });
        let packing = Packing { seq_lens, position_ids };
        debug_assert!(packing.position_ids.as_ref().is_none_or(|p| p.len() == packing.n_tokens()));
        packing
    }
}
