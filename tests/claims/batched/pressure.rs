//! With little room tapes are kept small, and those that wait shrink: nobody loses a step, and the
//! numbers are those of a device with room for all.

use crate::{F32, of_family, smooth, store, tensors};
use offshoot_client::{Client, ExportedAdapter, LoraConfig, MemoryReport, OpenSession};
use offshoot_model::weights::Checkpoint;
use offshoot_model::{ModelConfig, Part, PartSpec, TapeSize, Work};
use offshoot_tests::run::open_request;
use offshoot_tests::together::Turn::{Backward, Forward};
use offshoot_tests::together::{N_TOKENS, Player, distance, phase, step};
use offshoot_tests::{TestServer, fixture, server_config};
use tch::{Device, Kind};

const SESSIONS: usize = 3;
/// Microbatches of each session that are open at once.
const OPEN: usize = 3;
const STEPS: usize = 3;

struct Seen {
    numbers: Vec<(String, Vec<f32>)>,
    adapter: ExportedAdapter,
    tape_bytes: Vec<u64>,
}

struct Outcome {
    seen: Vec<Seen>,
    memory: MemoryReport,
    /// While all microbatches of the last step were open.
    held_bytes: u64,
}

async fn run(family: &str, memory_bytes: Option<u64>) -> Outcome {
    let folder = store();
    let mut config = of_family(family, server_config(folder.path()));
    config.limits.memory_bytes = memory_bytes;
    let server = TestServer::start_with(config).await;
    let client = Client::connect(&server.endpoint()).await.unwrap();
    let description = client.describe().await.unwrap();
    let hidden_size = description.hidden_size;
    let mut players = Vec::new();
    for seed in 0..SESSIONS as u64 {
        let lora = LoraConfig {
            r: 1 + seed as u32,
            lora_alpha: 4.0,
            lora_dropout: 0.1,
            use_rslora: false,
            // Adapters that are small beside the tapes, so that nobody has to leave for them.
            target_modules: description.lora_modules[..1].to_vec(),
        };
        let request = open_request(&client).await.unwrap();
        let request = OpenSession { lora, adamw: smooth(), seed, ..request };
        players.push(Player::new(client.open(request).await.unwrap(), hidden_size, seed));
    }
    let mut held_bytes = 0;
    for _ in 0..STEPS {
        let mut players: Vec<&mut Player> = players.iter_mut().collect();
        for _ in 0..OPEN {
            phase(&mut players, |_| Forward).await.into_iter().for_each(|done| done.unwrap());
        }
        held_bytes = client.describe().await.unwrap().memory.tape_bytes;
        for _ in 0..OPEN {
            phase(&mut players, |_| Backward).await.into_iter().for_each(|done| done.unwrap());
        }
        step(&mut players).await;
    }
    let memory = client.describe().await.unwrap().memory;
    let mut seen = Vec::new();
    for player in players {
        let adapter = player.session.export().await.unwrap();
        let Player { numbers, tape_bytes, .. } = player;
        seen.push(Seen { numbers, adapter, tape_bytes });
    }
    server.drain().await;
    Outcome { seen, memory, held_bytes }
}

/// Bytes of all tapes that are open at once, if each has this size, and of what the device needs
/// beside them and the adapters.
struct Sizes {
    full: u64,
    blocks: u64,
    input: u64,
    /// Weights, and room for any one backward.
    fixed: u64,
}

fn sizes(family: &str) -> Sizes {
    let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
    let config = ModelConfig::from_json(checkpoint.config()).unwrap();
    let spec = PartSpec { layers: 1..3, embed: false, head: false };
    let part = Part::load(&checkpoint, &config, spec, Kind::Float, Device::Cpu).unwrap();
    let n_tokens = N_TOKENS as u64;
    let all = |size| (SESSIONS * OPEN) as u64 * part.tape_bytes(n_tokens, size, None);
    let workspace = part.workspace_bytes(n_tokens, Work::Backward(TapeSize::Input));
    Sizes {
        full: all(TapeSize::Full),
        blocks: all(TapeSize::Blocks),
        input: all(TapeSize::Input),
        fixed: part.weights_bytes() + workspace,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_tapes_give_the_same_numbers() {
    for family in ["llama", "gpt2"] {
        let sizes = sizes(family);
        let roomy = run(family, None).await;
        let full: u64 = roomy.seen.iter().flat_map(|s| &s.tape_bytes[..OPEN]).sum();
        assert!(roomy.held_bytes == full && full > sizes.full, "with room for all, tapes are full");
        let fixed = sizes.fixed + roomy.memory.peak.unwrap().adapter_bytes;
        // Some have to give up all but the inputs of blocks, then some even those.
        for room in [sizes.full / 3, (sizes.blocks + sizes.input) / 2] {
            let tight = run(family, Some(fixed + room)).await;
            let left: u64 =
                tight.seen.iter().flat_map(|s| &s.tape_bytes[(STEPS - 1) * OPEN..]).sum();
            let held = tight.held_bytes;
            println!("{family}: {full} bytes of tapes in {room}; left {left}, shrunk to {held}");
            assert!(left < full, "no forward kept less than everything");
            assert!(held < left, "no tape shrank while it waited");
            for (found, expected) in tight.seen.iter().zip(&roomy.seen) {
                let numbers = distance(&found.numbers, &expected.numbers);
                let adapter = distance(&tensors(&found.adapter), &tensors(&expected.adapter));
                println!("  numbers {numbers:.1e}, adapter {adapter:.1e}");
                assert!(numbers < F32 && adapter < F32, "{family}: {numbers:.1e} {adapter:.1e}");
            }
        }
    }
}
