use super::*;
use crate::verify;
use offshoot_adapters::AdapterSet;
use offshoot_adapters::peft::PeftAdapter;
use offshoot_model::{Part, PartSpec, Rows, Segment};
use safetensors::SafeTensors;

const LARGE: u64 = 5_000_000_000;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn options(dir: &Path, kind: Option<Kind>, max_shard_bytes: u64) -> MergeOptions {
    MergeOptions { output_dir: dir.join("merged"), kind, max_shard_bytes }
}

/// Logits `[T, V]` of each sequence, run alone.
fn logits(model: &Checkpoint, adapter: Option<&Adapter>, sequences: &[Vec<i64>]) -> Vec<Tensor> {
    let _guard = tch::no_grad_guard();
    let config = ModelConfig::from_json(model.config()).unwrap();
    let whole = PartSpec::whole(&config);
    let part = Part::load(model, &config, whole, Kind::Float, Device::Cpu).unwrap();
    let set = adapter.map(|adapter| {
        let sites = part.sites(&adapter.spec.target_modules).unwrap();
        let mut set = AdapterSet::init(adapter.spec.clone(), sites, 0, Device::Cpu).unwrap();
        set.load_named(&adapter.tensors).unwrap();
        set
    });
    let of_one = |ids: &Vec<i64>| {
        let rows = Rows::new(&[ids.len()], None, Device::Cpu);
        let hidden = part.embed(&Tensor::from_slice(ids), &rows);
        let rows_of = 0..ids.len() as i64;
        let segment = Segment { rows: rows_of, adapter: set.as_ref(), dropout: None };
        part.logits(&part.forward(&hidden, &rows, &[segment], &[None]).0)
    };
    sequences.iter().map(of_one).collect()
}

/// Largest difference of any logit.
fn distance(ours: &[Tensor], theirs: &[Tensor]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let pairs = ours.iter().zip(theirs);
    pairs.map(|(a, b)| (a - b).abs().max().double_value(&[])).fold(0.0, f64::max)
}

fn pefts_logits(family: &str, n: usize) -> Vec<Tensor> {
    let bytes = fs::read(fixture(family).join("reference.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of = |i: usize| {
        let view = file.tensor(&format!("logits.{i}")).unwrap();
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, Kind::Float)
    };
    (0..n).map(of).collect()
}

#[test]
fn a_merged_model_computes_what_peft_computes() {
    for family in ["gpt2", "llama", "qwen2", "qwen3", "gemma"] {
        let dir = tempfile::tempdir().unwrap();
        let base = Checkpoint::open(&fixture(family)).unwrap();
        let adapter = Adapter::read(&fixture(family).join("adapter")).unwrap();
        let sequences = verify::read_case(&fixture(family).join("case.json")).unwrap();
        let expected = pefts_logits(family, sequences.len());
        let before = distance(&logits(&base, None, &sequences), &expected);
        assert!(before > 1e-2, "{family}: the adapter changes nothing that could be seen");

        let n_pairs = adapter.tensors.len() / 2;
        let options = options(dir.path(), None, 40_000);
        let merged = merge(&base, adapter, &options).unwrap();
        assert_eq!(merged.n_changed, n_pairs);
        assert!(merged.n_files > 1, "{merged:?}");
        let model = Checkpoint::open(&options.output_dir).unwrap();
        let far = distance(&logits(&model, None, &sequences), &expected);
        println!("{family}: base {before:.1e}, merged {far:.1e} from PEFT's logits");
        assert!(far < 1e-4, "{family}: {far:.1e}");

        assert_eq!(model.config(), base.config(), "{family}");
        assert_eq!(model.names().count(), merged.n_tensors);
        let tied = model.config()["tie_word_embeddings"] != false;
        assert_eq!(model.contains("lm_head.weight"), !tied, "{family}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}

#[test]
fn other_dtypes_are_said_in_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&fixture("llama")).unwrap();
    let adapter = Adapter::read(&fixture("llama").join("adapter")).unwrap();
    let options = options(dir.path(), Some(Kind::BFloat16), LARGE);
    let merged = merge(&base, adapter, &options).unwrap();
    assert_eq!(merged.n_files, 1);
    let model = Checkpoint::open(&options.output_dir).unwrap();
    assert_eq!(model.config()["dtype"], "bfloat16");
    for name in model.names() {
        assert_eq!(model.stored_kind(name), Some(Kind::BFloat16), "{name}");
    }
    // Kept where nothing else is asked for.
    let again = MergeOptions { output_dir: dir.path().join("again"), kind: None, ..options };
    let adapter = Adapter::read(&fixture("llama").join("adapter")).unwrap();
    merge(&model, adapter, &again).unwrap();
    let model = Checkpoint::open(&again.output_dir).unwrap();
    assert_eq!(model.config()["dtype"], "bfloat16");
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(model.stored_kind(q), Some(Kind::BFloat16));
}

#[test]
fn a_gguf_file_becomes_a_model_directory() {
    for name in ["llama", "qwen2"] {
        let dir = tempfile::tempdir().unwrap();
        let base = Checkpoint::open(&fixture(&format!("gguf/{name}.gguf"))).unwrap();
        let config = ModelConfig::from_json(base.config()).unwrap();
        let sites = config.sites(0..config.n_layers, &config.default_targets()).unwrap();
        let PeftAdapter { spec, tensors, .. } = verify::draw_adapter(&config, &sites, 3);
        let adapter = || Adapter {
            spec: spec.clone(),
            tensors: of(&tensors),
            base_model: None,
            origin: PathBuf::new(),
        };
        let sequences = verify::draw_case(&config, 2);
        let fitted = adapter().fit(&config).unwrap();
        let expected = logits(&base, Some(&fitted), &sequences);

        let options = options(dir.path(), None, LARGE);
        merge(&base, adapter(), &options).unwrap();
        let model = Checkpoint::open(&options.output_dir).unwrap();
        let far = distance(&logits(&model, None, &sequences), &expected);
        println!("{name}: merged {far:.1e} from the GGUF file with the adapter");
        assert!(far < 1e-4, "{name}: {far:.1e}");
        assert_eq!(model.config()["torch_dtype"], "float32");

        let [ours, theirs] = [&model, &base].map(|m| crate::tokenizer::Tokenizer::load(m).unwrap());
        let text = "The trunk, 12 leaves and\n\n  a naïve café.";
        assert_eq!(ours.encode(text).unwrap(), theirs.encode(text).unwrap(), "{name}");
        assert_eq!(ours.eos_id(), theirs.eos_id());
    }
}

fn of(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

#[test]
fn nothing_is_overwritten_and_nothing_half_written_stays() {
    let dir = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&fixture("llama")).unwrap();
    let adapter = || Adapter::read(&fixture("llama").join("adapter")).unwrap();
    let options = options(dir.path(), None, LARGE);
    fs::create_dir(&options.output_dir).unwrap();
    fs::write(options.output_dir.join("notes"), "mine").unwrap();
    let error = merge(&base, adapter(), &options).unwrap_err().to_string();
    assert!(error.starts_with("--output-dir = ") && error.contains("something in it"), "{error}");

    // Embedding and head have another shape than the configuration says.
    let broken = dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(fixture("llama/model.safetensors"), broken.join("model.safetensors")).unwrap();
    let mut config = base.config().clone();
    config["vocab_size"] = 98.into();
    fs::write(broken.join("config.json"), config.to_string()).unwrap();
    let base = Checkpoint::open(&broken).unwrap();
    let options = MergeOptions { output_dir: dir.path().join("new"), ..options };
    let error = merge(&base, adapter(), &options).unwrap_err().to_string();
    assert!(error.contains("config.json asks for [98, 40]"), "{error}");
    assert!(!options.output_dir.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
