use super::command::Exported;
use super::start::TrunkInfo;
use crate::error::Error;
use offshoot_adapters::{AdapterState, LoraSpec};
use offshoot_proto::{HostTensor, WireDType};

/// An adapter as PEFT names it, of a session that is not on the device. Nothing is computed: the
/// matrices lie one after the other in the flat buffer, for each site A `[r, d_in]`, then B
/// `[d_out, r]`.
pub fn export_state(
    trunk: &TrunkInfo,
    lora: &LoraSpec,
    state: &AdapterState,
    gradients: bool,
) -> Result<Exported, Error> {
    let (found, expected) = (state.parameters.len(), trunk.n_parameters(lora));
    if found as u64 != expected || state.gradients.len() != found {
        let (found, expected) = (found.to_string(), format!("{expected} of this model's layers"));
        return Err(Error::Setting { field: "number of stored LoRA values", found, expected });
    }
    let named = |flat: &[f32]| {
        let mut rest = flat;
        let mut next = |name: String, shape: [usize; 2]| {
            let (values, behind) = rest.split_at(shape[0] * shape[1]);
            rest = behind;
            (name, HostTensor::from_f32(values, shape.to_vec(), WireDType::F32))
        };
        let of_site = |site: &offshoot_adapters::Site| {
            let (r, d_in, d_out) = (lora.r, site.d_in as usize, site.d_out as usize);
            let [a, b] = site.peft_names();
            [next(a, [r, d_in]), next(b, [d_out, r])]
        };
        trunk.sites_of(lora).flat_map(of_site).collect()
    };
    Ok(Exported {
        tensors: named(&state.parameters),
        gradients: if gradients { named(&state.gradients) } else { Vec::new() },
        step: state.n_steps,
    })
}
