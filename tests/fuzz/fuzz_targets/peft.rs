//! A PEFT directory: `adapter_config.json` and `adapter_model.safetensors`. What is read can be
//! written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use offshoot_adapters::peft::{self, PeftConfig};

fuzz_target!(|bytes: &[u8]| {
    let Some([config, weights]) = offshoot_fuzz::parts(bytes) else { return };
    let dir = offshoot_fuzz::empty_dir();
    offshoot_fuzz::write(&dir.join(peft::CONFIG), config);
    offshoot_fuzz::write(&dir.join(peft::WEIGHTS), weights);
    let Ok(read) = peft::read_dir(dir) else { return };
    assert!(read.spec.r > 0 && read.spec.scaling().is_finite());
    let base_model = read.base_model.as_deref().unwrap_or_default();
    let config = PeftConfig { spec: &read.spec, base_model, fan_in_fan_out: false };
    let out = dir.join("again");
    peft::write_dir(&out, &config, &read.tensors).expect("what was read can be written");
    let again = peft::read_dir(&out).expect("what was written can be read");
    assert_eq!(again.spec, read.spec);
    assert_eq!(again.tensors.len(), read.tensors.len());
    for ((name, tensor), (name_again, again)) in read.tensors.iter().zip(&again.tensors) {
        assert_eq!((name, tensor.size()), (name_again, again.size()));
    }
});
