use crate::init::init_a;
use crate::optimizer::{Buffers, Stepped};
use crate::{AdamW, AdapterError, AdapterState, LoraSpec, Site};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// One adapter being trained: its LoRA matrices, gradients and AdamW moments as four flat float32
/// buffers of P elements on one device. For each site A `[r, d_in]` is followed by B `[d_out, r]`.
pub struct AdapterSet {
    spec: LoraSpec,
    sites: Vec<Site>,
    /// Site by path.
    index: HashMap<String, usize>,
    /// Where each site's A begins in the flat buffers.
    offsets: Vec<i64>,
    parameters: Tensor,
    gradients: Tensor,
    first_moments: Tensor,
    second_moments: Tensor,
    n_steps: u64,
    is_finite: bool,
    /// Of `parameters`, made once: making them for each product would cost more than small products.
    pairs: Vec<LoraPair>,
}

/// LoRA's two matrices at one site, and their transposes, all views of the same memory.
pub struct LoraPair {
    /// `[r, d_in]`.
    pub a: Tensor,
    /// `[d_in, r]`.
    pub a_t: Tensor,
    /// `[d_out, r]`.
    pub b: Tensor,
    /// `[r, d_out]`.
    pub b_t: Tensor,
}

impl AdapterSet {
    /// A fresh adapter as PEFT begins one: A uniform, B zero, so that it changes nothing yet.
    pub fn init(
        spec: LoraSpec,
        sites: Vec<Site>,
        seed: u64,
        device: Device,
    ) -> Result<Self, AdapterError> {
        spec.validate()?;
        let mut parameters = Vec::new();
        for site in &sites {
            parameters.extend(init_a(seed, site, spec.r));
            parameters.resize(parameters.len() + spec.r * site.d_out as usize, 0.0);
        }
        let zeros = vec![0.0; parameters.len()];
        let state = AdapterState {
            gradients: zeros.clone(),
            first_moments: zeros.clone(),
            second_moments: zeros,
            parameters,
            n_steps: 0,
        };
        Self::from_state(spec, sites, state, device)
    }

    /// An adapter as [`AdapterSet::to_state`] left it.
    pub fn from_state(
        spec: LoraSpec,
        sites: Vec<Site>,
        state: AdapterState,
        device: Device,
    ) -> Result<Self, AdapterError> {
        spec.validate()?;
        let mut offsets = Vec::with_capacity(sites.len());
        let mut n_parameters = 0;
        for site in &sites {
            offsets.push(n_parameters);
            n_parameters += spec.r as i64 * (site.d_in + site.d_out);
        }
        let upload = |name: &str, values: &[f32]| {
            if values.len() as i64 != n_parameters {
                return Err(AdapterError::Shape {
                    origin: "adapter state".into(),
                    name: name.into(),
                    found: vec![values.len() as i64],
                    expected: vec![n_parameters],
                });
            }
            Ok(Tensor::from_slice(values).to_device(device))
        };
        let mut set = AdapterSet {
            parameters: upload("parameters", &state.parameters)?,
            gradients: upload("gradients", &state.gradients)?,
            first_moments: upload("first_moments", &state.first_moments)?,
            second_moments: upload("second_moments", &state.second_moments)?,
            n_steps: state.n_steps,
            index: sites.iter().enumerate().map(|(i, site)| (site.path.clone(), i)).collect(),
            spec,
            sites,
            offsets,
            is_finite: true,
            pairs: Vec::new(),
        };
        set.changed();
        Ok(set)
    }

    /// The parameters `[P]`, a view.
    pub fn parameters(&self) -> &Tensor {
        &self.parameters
    }

    /// Copies parameters `[P]` of another set with the same sites, on any device.
    pub fn set_parameters(&mut self, parameters: &Tensor) {
        self.parameters.copy_(parameters);
        self.check_finite();
    }

    /// Everything that changes while training, copied to the host.
    pub fn to_state(&self) -> AdapterState {
        AdapterState {
            parameters: to_host(&self.parameters),
            gradients: to_host(&self.gradients),
            first_moments: to_host(&self.first_moments),
            second_moments: to_host(&self.second_moments),
            n_steps: self.n_steps,
        }
    }

    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// P, the number of trained values.
    pub fn n_parameters(&self) -> i64 {
        self.parameters.numel() as i64
    }

    /// The sum of its ranks at all sites.
    pub fn ranks(&self) -> u64 {
        (self.sites.len() * self.spec.r) as u64
    }

    /// Optimizer steps taken.
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// Bytes on the device: parameters, gradients and both moments.
    pub fn bytes(&self) -> u64 {
        4 * 4 * self.n_parameters() as u64
    }

    pub fn device(&self) -> Device {
        self.parameters.device()
    }

    /// The index of the site at a full module path, if that module carries LoRA.
    pub fn site_index(&self, path: &str) -> Option<usize> {
        self.index.get(path).copied()
    }

    /// A `[r, d_in]` and B `[d_out, r]` of a site, as views.
    pub fn matrices(&self, site: usize) -> (Tensor, Tensor) {
        self.views(&self.parameters, site)
    }

    /// A and B of a site with their transposes.
    pub fn pair(&self, site: usize) -> &LoraPair {
        &self.pairs[site]
    }

    /// The places of A `[r, d_in]` and B `[d_out, r]` of a site in a flat `[P]` buffer, as views.
    pub fn views(&self, flat: &Tensor, site: usize) -> (Tensor, Tensor) {
        let (r, offset) = (self.spec.r as i64, self.offsets[site]);
        let Site { d_in, d_out, .. } = self.sites[site];
        let a = flat.narrow(0, offset, r * d_in).view([r, d_in]);
        let b = flat.narrow(0, offset + r * d_in, d_out * r).view([d_out, r]);
        (a, b)
    }

    /// A `[P]` float32 buffer of zeros for one backward to write into.
    pub fn new_gradient(&self) -> Tensor {
        self.parameters.zeros_like()
    }

    /// Adds a flat `[P]` gradient to what earlier backwards left.
    pub fn accumulate(&mut self, gradient: &Tensor) {
        let _ = self.gradients.g_add_(gradient);
    }

    /// The accumulated gradient `[P]`, a view.
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// Sum of squares of the accumulated gradients.
    pub fn grad_norm_squared(&self) -> f64 {
        self.gradients.dot(&self.gradients).double_value(&[])
    }

    /// Adds a `[P]` gradient, which is used up, and gives the sum of squares of all that is accumulated
    /// then; unless that is no number: then nothing is changed. Takes no memory.
    pub fn accumulate_if_finite(&mut self, gradient: Tensor) -> Option<f64> {
        // Into the new one: a sum is the same either way round.
        let mut sum = gradient;
        let _ = sum.g_add_(&self.gradients);
        let norm_squared = sum.dot(&sum).double_value(&[]);
        norm_squared.is_finite().then(|| {
            self.gradients = sum;
            norm_squared
        })
    }

    /// One AdamW step on the accumulated gradients times `clip_factor`; then they are zero. Takes five
    /// times `[P]` while it runs.
    pub fn step(&mut self, optimizer: &AdamW, learning_rate: f64, clip_factor: f64) {
        let stepped = self.next(optimizer, learning_rate, clip_factor);
        self.take_over(stepped);
    }

    /// What such a step would make of this set, which does not change; None: what would not be finite.
    pub fn next_if_finite(
        &self,
        optimizer: &AdamW,
        learning_rate: f64,
        clip_factor: f64,
    ) -> Option<Stepped> {
        let stepped = self.next(optimizer, learning_rate, clip_factor);
        let Stepped { parameters, first_moments, second_moments } = &stepped;
        let all_finite = [parameters, first_moments, second_moments].into_iter().all(is_finite);
        all_finite.then_some(stepped)
    }

    fn next(&self, optimizer: &AdamW, learning_rate: f64, clip_factor: f64) -> Stepped {
        let now = Buffers {
            parameters: &self.parameters,
            gradients: &self.gradients,
            first_moments: &self.first_moments,
            second_moments: &self.second_moments,
        };
        optimizer.next(now, self.n_steps + 1, learning_rate, clip_factor)
    }

    /// Makes a step, with what was computed for it and nothing changed since. Gradients are zero then.
    pub fn take_over(&mut self, stepped: Stepped) {
        let Stepped { parameters, first_moments, second_moments } = stepped;
        // In place: every A and B is a view of them.
        self.parameters.copy_(&parameters);
        (self.first_moments, self.second_moments) = (first_moments, second_moments);
        let _ = self.gradients.zero_();
        self.n_steps += 1;
        self.check_finite();
    }

    /// Whether every parameter was a number after the last change. One that has diverged must not
    /// meet another's rows, not even multiplied by zero.
    pub fn is_finite(&self) -> bool {
        self.is_finite
    }

    /// The parameters are in other memory.
    fn changed(&mut self) {
        let pair = |site| {
            let (a, b) = self.matrices(site);
            LoraPair { a_t: a.tr(), b_t: b.tr(), a, b }
        };
        self.pairs = (0..self.sites.len()).map(pair).collect();
        self.check_finite();
    }

    fn check_finite(&mut self) {
        self.is_finite = is_finite(&self.parameters);
    }

    /// Every LoRA matrix as a float32 host tensor under its name in a PEFT file.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.named(&self.parameters)
    }

    /// The accumulated gradients in the same form.
    pub fn named_gradients(&self) -> Vec<(String, Tensor)> {
        self.named(&self.gradients)
    }

    fn named(&self, flat: &Tensor) -> Vec<(String, Tensor)> {
        // `copy` detaches the values from the buffer, which training goes on to change.
        let host = flat.to_device(Device::Cpu).copy();
        let of_site = |(i, site): (usize, &Site)| {
            let (a, b) = self.views(&host, i);
            let [name_a, name_b] = site.peft_names();
            [(name_a, a), (name_b, b)]
        };
        self.sites.iter().enumerate().flat_map(of_site).collect()
    }

    /// Sets the parameters from PEFT's tensors. All of this set's must be there; others, of layers
    /// that are trained elsewhere, are passed over. Nothing changes if one does not fit.
    pub fn load_named(&mut self, tensors: &[(String, Tensor)]) -> Result<(), AdapterError> {
        let by_name: HashMap<&str, &Tensor> =
            tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let loaded = self.parameters.zeros_like();
        for (i, site) in self.sites.iter().enumerate() {
            let (a, b) = self.views(&loaded, i);
            for (name, mut place) in site.peft_names().into_iter().zip([a, b]) {
                let value = by_name.get(name.as_str()).ok_or_else(|| missing(&name, tensors))?;
                if value.size() != place.size() {
                    return Err(AdapterError::Shape {
                        origin: "adapter".into(),
                        name,
                        found: value.size(),
                        expected: place.size(),
                    });
                }
                place.copy_(value);
            }
        }
        self.parameters = loaded;
        self.changed();
        Ok(())
    }
}

fn missing(name: &str, tensors: &[(String, Tensor)]) -> AdapterError {
    AdapterError::MissingTensor {
        origin: "adapter".into(),
        name: name.into(),
        hint: match tensors.first() {
            Some((first, _)) => format!(
                "it holds {} tensors such as \"{first}\"; was it made for the same model, layers and targets?",
                tensors.len()
            ),
            None => "it holds no tensors at all".into(),
        },
    }
}

/// Whether all values are numbers. A sum that overflows counts as none, too: it is not far from it.
fn is_finite(values: &Tensor) -> bool {
    values.sum(Kind::Float).double_value(&[]).is_finite()
}

fn to_host(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.numel()];
    tensor.to_device(Device::Cpu).copy_data(&mut values, tensor.numel());
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> AdapterSet {
        let sites = vec![
            Site::new(0, "mlp.up_proj", "model.layers.0.mlp.up_proj", 5, 3),
            Site::new(2, "mlp.up_proj", "model.layers.2.mlp.up_proj", 4, 7),
        ];
        let spec = LoraSpec { r: 2, ..LoraSpec::default() };
        AdapterSet::init(spec, sites, 11, Device::Cpu).unwrap()
    }

    #[test]
    fn a_module_starts_the_same_wherever_the_model_is_cut() {
        let whole = set();
        let part =
            AdapterSet::init(whole.spec().clone(), vec![whole.sites()[1].clone()], 11, Device::Cpu)
                .unwrap();
        assert!(whole.matrices(1).0.equal(&part.matrices(0).0));
        assert!(!whole.matrices(0).0.equal(&whole.matrices(0).0.zeros_like()));
        assert!(whole.matrices(1).1.equal(&whole.matrices(1).1.zeros_like()));
    }

    #[test]
    fn state_survives_its_file() {
        let mut set = set();
        let gradient = Tensor::arange(set.n_parameters(), (Kind::Float, Device::Cpu));
        set.accumulate(&gradient);
        set.step(&AdamW::default(), 0.1, 0.5);
        set.accumulate(&gradient);
        let state = set.to_state();
        assert_eq!(state.n_steps, 1);
        assert!(set.is_finite());
        assert_eq!(AdapterState::from_safetensors(&state.to_safetensors()).unwrap(), state);
        let cut = &state.to_safetensors()[..100];
        assert!(AdapterState::from_safetensors(cut).is_err());
    }

    #[test]
    fn divergence_is_noticed() {
        let mut set = set();
        set.accumulate(&set.new_gradient().ones_like());
        set.step(&AdamW::default(), 3e38, 1.0);
        set.accumulate(&set.new_gradient().ones_like());
        set.step(&AdamW::default(), 3e38, 1.0);
        assert!(!set.is_finite());
    }

    #[test]
    fn a_set_loads_its_own_tensors_and_no_others() {
        let mut set = set();
        let mut tensors = set.named_tensors();
        for (_, tensor) in &mut tensors {
            let _ = tensor.fill_(0.25);
        }
        set.load_named(&tensors).unwrap();
        assert_eq!(set.to_state().parameters, vec![0.25; set.n_parameters() as usize]);

        let error = set.load_named(&tensors[1..]).unwrap_err().to_string();
        assert!(error.contains("model.layers.0.mlp.up_proj.lora_A.weight"), "{error}");
        tensors[0].1 = Tensor::zeros([2, 6], (Kind::Float, Device::Cpu));
        let error = set.load_named(&tensors).unwrap_err().to_string();
        assert!(error.contains("[2, 6]") && error.contains("[2, 5]"), "{error}");
    }

    #[test]
    fn what_would_not_be_finite_changes_nothing() {
        let site = Site::new(0, "q", "model.layers.0.q", 3, 2);
        let spec = LoraSpec { r: 2, ..LoraSpec::default() };
        let mut set = AdapterSet::init(spec, vec![site], 1, Device::Cpu).unwrap();
        let adamw = AdamW::default();
        let flat = |value: f64| set_like(&set.parameters, value);
        let (gradient, large) = (flat(0.5), flat(1.5e19));
        assert!(set.accumulate_if_finite(gradient).is_some());
        let stepped = set.next_if_finite(&adamw, 0.1, 1.0).unwrap();
        set.take_over(stepped);
        let half = 0.5 * set.n_parameters() as f64;
        let again = set_like(&set.parameters, 0.5);
        assert_eq!(set.accumulate_if_finite(again), Some(half * 0.5));
        let before = set.to_state();
        for rate in [1e300, f64::MAX, f64::INFINITY, f64::NAN] {
            assert!(set.next_if_finite(&adamw, rate, 1.0).is_none(), "{rate}");
            assert_eq!(set.to_state(), before);
        }
        let heavy = AdamW { weight_decay: 1e300, ..AdamW::default() };
        assert!(set.next_if_finite(&heavy, 0.1, 1.0).is_none());
        // Two gradients whose squares are numbers, and whose sum's is none.
        assert!(set.accumulate_if_finite(large.copy()).is_none());
        for _ in 0..2 {
            assert!(set.accumulate_if_finite(set_like(&large, f64::NAN)).is_none());
        }
        assert_eq!(set.to_state(), before);
        set.take_over(set.next_if_finite(&adamw, 0.1, 1.0).unwrap());
        assert!(set.is_finite() && set.n_steps() == 2);
    }

    fn set_like(like: &Tensor, value: f64) -> Tensor {
        like.full_like(value)
    }
}
