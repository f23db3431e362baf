//! A snapshot's way to the disk: its files first, then the record that names them.

use super::{
    BlobName, NewSnapshot, Origin, Record, References, SnapshotRecord, Store, millis_of,
    name_blobs, unknown,
};
use crate::error::Error;
use crate::meter::Meter;
use crate::session::SessionId;
use std::time::{Instant, SystemTime};

impl Store {
    /// Makes a snapshot durable. `record` is asked for while no other changes.
    pub(super) fn append(
        &self,
        session: SessionId,
        new: NewSnapshot,
        record: impl FnOnce() -> Result<Record, Error>,
    ) -> Result<SnapshotRecord, Error> {
        let _open = self.still_open()?;
        let begun = Instant::now();
        let written = self.noted(session, self.write(session, new, record));
        if let Some(series) = self.meter(session).as_deref().and_then(Meter::series) {
            match &written {
                Ok(snapshot) => series.snapshot(begun.elapsed(), Ok(snapshot.bytes)),
                // Set back or forgotten meanwhile.
                Err(Error::Ended | Error::UnknownSession(_)) => {}
                Err(error) => series.snapshot(begun.elapsed(), Err(error)),
            }
        }
        written
    }

    /// Writes the blobs, then the record: `record` is asked for while no other changes.
    fn write(
        &self,
        session: SessionId,
        new: NewSnapshot,
        record: impl FnOnce() -> Result<Record, Error>,
    ) -> Result<SnapshotRecord, Error> {
        let snapshot = SnapshotRecord {
            id: String::new(),
            step: new.step,
            sequence: new.sequence,
            origin: new.why.origin(),
            reason: new.why.name().into(),
            taken_millis: millis_of(SystemTime::now()),
            state: BlobName::of(&new.state),
            answers: new.answers.as_deref().map(BlobName::of),
            bytes: (new.state.len() + new.answers.as_ref().map_or(0, Vec::len)) as u64,
        };
        // Named before they are there, so that nobody deletes them meanwhile.
        let named: Vec<BlobName> = snapshot.blobs().cloned().collect();
        name_blobs(&mut self.references(), &named);
        let contents = [Some(new.state.as_slice()), new.answers.as_deref()].into_iter().flatten();
        let written = self.reserve.take();
        let written = written.and_then(|()| self.blobs.write_all(named.iter().zip(contents)));
        let mut references = self.references();
        let record = match written.and_then(|()| record()) {
            Ok(record) => record,
            Err(error) => {
                self.release(&mut references, named.iter())?;
                return Err(error);
            }
        };
        // If this fails, the record on disk may be the new one: its files stay until the next start.
        let snapshot = self.record_snapshot(&mut references, session, record, snapshot)?;
        self.release(&mut references, named.iter())?;
        Ok(snapshot)
    }

    fn record_snapshot(
        &self,
        references: &mut References,
        session: SessionId,
        mut record: Record,
        mut snapshot: SnapshotRecord,
    ) -> Result<SnapshotRecord, Error> {
        // Asked twice for the same point, as after a lost answer: it is there already.
        if let Some(head) = record.head().filter(|head| is_same(head, &snapshot)).cloned() {
            return match snapshot.origin {
                Origin::Client => self.claim(references, session, record),
                Origin::Server => Ok(head),
            };
        }
        snapshot.id = format!("{}-step{}", record.n_snapshots + 1, snapshot.step);
        record.push(snapshot.clone());
        let dropped = record.drop_surplus(self.kept);
        self.put(session, record)?;
        name_blobs(references, snapshot.blobs());
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(snapshot)
    }

    pub(super) fn claim(
        &self,
        references: &mut References,
        session: SessionId,
        mut record: Record,
    ) -> Result<SnapshotRecord, Error> {
        let head = record.claim_head().ok_or_else(|| unknown(session))?;
        let dropped = record.drop_surplus(self.kept);
        self.put(session, record)?;
        self.release(references, dropped.iter().flat_map(SnapshotRecord::blobs))?;
        Ok(head)
    }
}

fn is_same(head: &SnapshotRecord, new: &SnapshotRecord) -> bool {
    (head.sequence, head.step, &head.state) == (new.sequence, new.step, &new.state)
}
