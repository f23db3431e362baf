use crate::engine::{Settings, TrunkInfo};
use crate::error::Error;
use crate::session::{Recorded, Resume, SessionId};
use crate::store::{NewSnapshot, Record, SnapshotRecord, StoredSnapshot, Why};
use offshoot_adapters::AdapterState;
use offshoot_proto::v1::{ServerFrame, SnapshotInfo};
use offshoot_proto::{WireDType, v1};
use prost::Message;
use std::sync::Arc;

/// A session in host memory, between device and store.
pub struct Copied {
    pub adapters: Arc<AdapterState>,
    pub resume: Resume,
}

impl Copied {
    /// For the store. Takes as long as copying the tensors once.
    pub fn encode(self, why: Why) -> NewSnapshot {
        let Copied { adapters, resume } = self;
        NewSnapshot {
            step: resume.step,
            sequence: resume.applied,
            why,
            state: adapters.to_safetensors(),
            answers: (!resume.answers.is_empty()).then(|| encode_answers(&resume.answers)),
        }
    }

    /// From the store, which has checked the hashes.
    pub fn decode(stored: StoredSnapshot) -> Result<Copied, Error> {
        let StoredSnapshot { record, state, answers } = stored;
        let answers = answers.map(|bytes| decode_answers(&bytes)).transpose()?;
        let resume = Resume { answers: answers.unwrap_or_default(), ..standing(&record) };
        Ok(Copied { adapters: Arc::new(AdapterState::from_safetensors(&state)?), resume })
    }
}

/// Where a session stands that goes on from a snapshot, without its recorded answers.
pub(super) fn standing(snapshot: &SnapshotRecord) -> Resume {
    Resume { applied: snapshot.sequence, step: snapshot.step, answers: Vec::new() }
}

/// For each answer: the digest of its frame, then the answer with its length.
fn encode_answers(answers: &[Recorded]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Recorded { digest, answer, .. } in answers {
        bytes.extend(digest);
        bytes.extend(answer.encode_length_delimited_to_vec());
    }
    bytes
}

fn decode_answers(mut bytes: &[u8]) -> Result<Vec<Recorded>, Error> {
    let damaged = |cause: String| Error::StoreRecords { path: "recorded answers".into(), cause };
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let (digest, rest) =
            bytes.split_first_chunk::<32>().ok_or_else(|| damaged("a digest is cut off".into()))?;
        bytes = rest;
        let answer = ServerFrame::decode_length_delimited(&mut bytes)
            .map_err(|error| damaged(error.to_string()))?;
        answers.push(Recorded { sequence: answer.sequence, digest: *digest, answer });
    }
    Ok(answers)
}

/// Refuses what another trunk trained.
pub fn fits(
    session: SessionId,
    record: &Record,
    snapshot: &SnapshotRecord,
    trunk: &TrunkInfo,
) -> Result<(), Error> {
    let differs = |what, theirs: String, ours: String| {
        let snapshot = snapshot.id.clone();
        Err(Error::SnapshotMismatch { session, snapshot, what, theirs, ours })
    };
    if record.fingerprint != trunk.fingerprint {
        let (theirs, ours) = (record.fingerprint.clone(), trunk.fingerprint.clone());
        return differs("base model's fingerprint", theirs, ours);
    }
    let layers = record.split_point_1..record.split_point_2;
    if layers != trunk.layers {
        return differs("range of layers", format!("{layers:?}"), format!("{:?}", trunk.layers));
    }
    Ok(())
}

/// What a stored session's adapter is.
pub(super) fn settings(record: &Record) -> Result<Settings, Error> {
    let wire_dtype = wire_dtype(record)?;
    record.lora.validate()?;
    let (lora, adamw, seed) = (record.lora.clone(), record.adamw.clone(), record.seed);
    let tenant = record.tenant.as_str().into();
    Ok(Settings { tenant, lora, adamw, seed, wire_dtype })
}

fn wire_dtype(record: &Record) -> Result<WireDType, Error> {
    let known = WireDType::ALL.into_iter().find(|dtype| dtype.name() == record.wire_dtype);
    known.ok_or_else(|| Error::Setting {
        field: "wire_dtype of the stored session",
        found: record.wire_dtype.clone(),
        expected: WireDType::ALL.map(WireDType::name).join(", "),
    })
}

/// A snapshot as clients see it.
pub fn to_proto(snapshot: &SnapshotRecord) -> SnapshotInfo {
    v1::SnapshotInfo {
        snapshot_id: snapshot.id.clone(),
        step: snapshot.step,
        sequence: snapshot.sequence,
        bytes: snapshot.bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Kept, Origin};
    use offshoot_proto::v1::{StepDone, server_frame::Body};

    fn record() -> Record {
        Record {
            tenant: String::new(),
            name: String::new(),
            lora: Default::default(),
            adamw: Default::default(),
            seed: 0,
            wire_dtype: "bf16".into(),
            fingerprint: "abc".into(),
            split_point_1: 1,
            split_point_2: 3,
            head: String::new(),
            snapshots: Vec::new(),
            n_snapshots: 0,
            kept: Vec::new(),
            epoch: 0,
            damaged: Vec::new(),
            metering: Default::default(),
            opened_millis: 0,
        }
    }

    #[test]
    fn a_session_survives_encoding() {
        let answer = |sequence| Recorded {
            sequence,
            digest: [sequence as u8; 32],
            answer: ServerFrame {
                sequence,
                body: Some(Body::Step(StepDone { step: 9, snapshot: false })),
            },
        };
        let resume = Resume { applied: 5, step: 2, answers: vec![answer(4), answer(5)] };
        let adapters = Arc::new(AdapterState {
            parameters: vec![1.0, 2.0],
            gradients: vec![3.0, 4.0],
            first_moments: vec![5.0, 6.0],
            second_moments: vec![7.0, 8.0],
            n_steps: 2,
        });
        let new = Copied { adapters: adapters.clone(), resume: resume.clone() };
        let new = new.encode(Why::Opened);
        let dir = tempfile::tempdir().unwrap();
        let store =
            crate::store::Store::open(dir.path(), Kept { of_client: 2, of_server: 1 }).unwrap();
        let session = SessionId::new();
        let taken = store.create(session, record(), new).unwrap();
        let back = Copied::decode(store.read(session, &taken).unwrap()).unwrap();
        assert_eq!(back.adapters, adapters);
        assert_eq!(back.resume, resume);
    }

    #[test]
    fn a_snapshot_of_another_trunk_is_refused_and_says_what_differs() {
        let trunk = TrunkInfo {
            model_name: "m".into(),
            model_type: "llama".into(),
            fingerprint: "abc".into(),
            n_layers: 4,
            max_positions: 64,
            layers: 1..3,
            hidden_size: 8,
            compute_dtype: crate::config::ComputeDType::F32,
            device: "cpu".into(),
            lora_modules: Vec::new(),
            default_targets: Vec::new(),
            weights_bytes: 0,
            parameters_per_rank: 0,
            sites: Vec::new(),
        };
        let snapshot = SnapshotRecord {
            id: "1-step0".into(),
            step: 0,
            sequence: 0,
            origin: Origin::Server,
            reason: String::new(),
            taken_millis: 0,
            state: Default::default(),
            answers: None,
            bytes: 0,
        };
        let session = SessionId::new();
        let text = |record: &Record| match fits(session, record, &snapshot, &trunk) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(text(&record()), "");
        let other = text(&Record { fingerprint: "xyz".into(), ..record() });
        assert!(["fingerprint", "xyz", "abc"].iter().all(|word| other.contains(word)), "{other}");
        let other = text(&Record { split_point_2: 4, ..record() });
        assert!(["range of layers", "1..4", "1..3"].iter().all(|w| other.contains(w)), "{other}");
    }

    #[test]
    fn cut_off_answers_are_an_error() {
        let answer = ServerFrame {
            sequence: 1,
            body: Some(Body::Step(StepDone { step: 9, snapshot: false })),
        };
        let bytes = encode_answers(&[Recorded { sequence: 1, digest: [1; 32], answer }]);
        assert_eq!(decode_answers(&bytes).unwrap().len(), 1);
        for cut in 1..bytes.len() {
            assert!(decode_answers(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}
