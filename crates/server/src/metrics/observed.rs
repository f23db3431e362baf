//! What is, rather than what happens: looked at when somebody asks. Each look is short and takes no lock for
//! long.

use super::definition::{self as metric, Definition};
use super::gpu::Gpu;
use crate::build_info::Build;
use crate::engine::EngineClient;
use crate::ledger::BytesKind;
use crate::quota::{Account, Amount};
use crate::registry::Registry;
use crate::residency::Tier;
use crate::transport::Connections;
use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where a server's state is.
pub struct Sources {
    pub build: Build,
    pub engine: EngineClient,
    /// Weak: whoever looks does not keep a server alive.
    pub registry: Weak<Registry>,
    pub connections: Connections,
    pub max_connections: usize,
    pub max_queued_jobs: usize,
    pub max_live_sessions: usize,
    pub store_dir: PathBuf,
}

/// [`Sources`], from the moment that they are there until the server ends.
#[derive(Default)]
pub(super) struct Watched {
    now: RwLock<Option<Looked>>,
}

struct Looked {
    sources: Sources,
    gpu: Option<Arc<Gpu>>,
    started: SystemTime,
}

impl Watched {
    pub fn set(&self, sources: Sources) {
        let gpu = Gpu::of(&sources.engine.trunk().device).map(Arc::new);
        let started = SystemTime::now();
        *self.now.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Looked { sources, gpu, started });
    }

    pub fn clear(&self) {
        let before = self.now.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(before);
    }

    pub fn gpu(&self) -> Option<Arc<Gpu>> {
        self.read().as_ref()?.gpu.clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Looked>> {
        self.now.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Values of one metric with their labels.
type Values = Vec<(f64, Vec<KeyValue>)>;

/// Makes the instruments that look.
pub(super) fn register(meter: &Meter, watched: &Arc<Watched>) {
    let gauge = |of: &Definition, look: fn(&Looked) -> Values| {
        let watched = watched.clone();
        let builder = meter.f64_observable_gauge(of.name).with_unit(of.unit);
        let builder = builder.with_description(of.about).with_callback(move |observer| {
            if let Some(looked) = &*watched.read() {
                for (value, labels) in look(looked) {
                    observer.observe(value, &labels);
                }
            }
        });
        // The callback lives as long as the provider.
        let _gauge = builder.build();
    };
    of_engine(&gauge);
    of_memory(&gauge);
    of_sessions(&gauge);
    of_server(&gauge);
    of_gpu(&gauge);
    let watched = watched.clone();
    let busy = &metric::ENGINE_BUSY;
    let builder = meter.f64_observable_counter(busy.name).with_unit(busy.unit);
    let builder = builder.with_description(busy.about).with_callback(move |observer| {
        if let Some(looked) = &*watched.read() {
            let nanos = looked.sources.engine.stats().busy_nanos.load(Ordering::Relaxed);
            observer.observe(Duration::from_nanos(nanos).as_secs_f64(), &[]);
        }
    });
    let _counter = builder.build();
}

/// Makes one gauge from what is there.
type Gauges<'a> = &'a dyn Fn(&Definition, fn(&Looked) -> Values);

fn of_engine(gauge: Gauges) {
    gauge(&metric::ENGINE_TURN, |looked| {
        let turn = looked.sources.engine.stats().turn();
        one(turn.map_or(0.0, |(_, lasts)| lasts.as_secs_f64()))
    });
    gauge(&metric::QUEUE_JOBS, |looked| {
        by_tenant(looked.waiting().into_iter().map(|(tenant, jobs)| (tenant, jobs as f64)))
    });
    gauge(&metric::QUEUE_LIMIT, |looked| one(looked.sources.max_queued_jobs as f64));
    gauge(&metric::QUEUE_AGE, |looked| {
        let oldest = looked.sources.engine.queue().oldest;
        one(oldest.map_or(0.0, |since| since.elapsed().as_secs_f64()))
    });
    gauge(&metric::VIRTUAL_TOKENS, |looked| by_tenant(looked.virtual_tokens()));
    gauge(&metric::MICROBATCHES, |looked| {
        one(looked.sources.engine.stats().n_tapes.load(Ordering::Relaxed) as f64)
    });
    gauge(&metric::CACHES, |looked| {
        one(looked.sources.engine.stats().n_caches.load(Ordering::Relaxed) as f64)
    });
}

fn of_memory(gauge: Gauges) {
    gauge(&metric::MEMORY_USAGE, |looked| {
        let now = looked.sources.engine.ledger().usage().now;
        let kinds = [
            BytesKind::Weights,
            BytesKind::Adapters,
            BytesKind::Tapes,
            BytesKind::Caches,
            BytesKind::Workspace,
        ];
        let labelled =
            |kind: BytesKind| (now.of(kind) as f64, vec![KeyValue::new("kind", kind.name())]);
        kinds.into_iter().map(labelled).collect()
    });
    gauge(&metric::MEMORY_PEAK, |looked| {
        one(looked.sources.engine.ledger().usage().peak_total as f64)
    });
    gauge(&metric::MEMORY_BUDGET, |looked| {
        looked.sources.engine.ledger().usage().budget.map_or_else(Vec::new, |n| one(n as f64))
    });
    gauge(&metric::HOST_USAGE, |looked| {
        looked.of_registry(|registry| one(registry.residency().host().usage().now.total() as f64))
    });
    gauge(&metric::HOST_BUDGET, |looked| {
        looked.of_registry(|registry| {
            let budget = registry.residency().host().usage().budget;
            one(budget.unwrap_or(0) as f64)
        })
    });
    gauge(&metric::PROCESS_MEMORY, |_| one(crate::host_memory::resident_bytes() as f64));
    gauge(&metric::TENANT_MEMORY, |looked| {
        let mut values = Values::new();
        for account in looked.sources.engine.accounts().all() {
            for (amount, kind) in [(Amount::AdapterBytes, "adapters"), (Amount::OpenBytes, "open")]
            {
                let labels = vec![tenant(account.name()), KeyValue::new("kind", kind)];
                values.push((account.amount(amount) as f64, labels));
            }
        }
        values
    });
}

fn of_sessions(gauge: Gauges) {
    gauge(&metric::SESSIONS_BY_STATE, |looked| looked.of_registry(sessions));
    gauge(&metric::SESSIONS_LIMIT, |looked| one(looked.sources.max_live_sessions as f64));
    gauge(&metric::SESSIONS_WAITING, |looked| {
        looked.of_registry(|registry| one(registry.residency().n_waiting() as f64))
    });
}

fn of_server(gauge: Gauges) {
    gauge(&metric::STORE_FREE, |looked| looked.disk(|free, _| free));
    gauge(&metric::STORE_SIZE, |looked| looked.disk(|_, size| size));
    gauge(&metric::CONNECTIONS, |looked| one(looked.sources.connections.len() as f64));
    gauge(&metric::CONNECTIONS_LIMIT, |looked| one(looked.sources.max_connections as f64));
    gauge(&metric::SERVING, |looked| one(f64::from(looked.is_serving())));
    gauge(&metric::DRAINING, |looked| {
        let draining = looked.sources.registry.upgrade().is_none_or(|r| r.is_draining());
        one(f64::from(draining))
    });
    gauge(&metric::START_TIME, |looked| {
        one(looked.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64())
    });
    gauge(&metric::BUILD_INFO, |looked| {
        let trunk = looked.sources.engine.trunk();
        let layers = format!("{}..{}", trunk.layers.start, trunk.layers.end);
        let labels = vec![
            KeyValue::new("version", looked.sources.build.version),
            KeyValue::new("commit", looked.sources.build.commit),
            KeyValue::new("model", trunk.model_name.clone()),
            KeyValue::new("layers", layers),
            KeyValue::new("device", trunk.device.clone()),
            KeyValue::new("dtype", trunk.compute_dtype.name()),
        ];
        vec![(1.0, labels)]
    });
}

fn of_gpu(gauge: Gauges) {
    gauge(&metric::GPU_MEMORY_USAGE, |looked| looked.gpu(|gpu| gpu.memory_used_bytes as f64));
    gauge(&metric::GPU_MEMORY_LIMIT, |looked| looked.gpu(|gpu| gpu.memory_total_bytes as f64));
    gauge(&metric::GPU_UTILIZATION, |looked| looked.gpu(|gpu| gpu.utilisation));
    gauge(&metric::GPU_TEMPERATURE, |looked| looked.gpu(|gpu| gpu.temperature_celsius));
    gauge(&metric::GPU_POWER, |looked| looked.gpu(|gpu| gpu.power_watts));
}

impl Looked {
    fn of_registry(&self, look: impl FnOnce(&Registry) -> Values) -> Values {
        self.sources.registry.upgrade().map_or_else(Vec::new, |registry| look(&registry))
    }

    fn is_serving(&self) -> bool {
        let drains = self.sources.registry.upgrade().is_none_or(|registry| registry.is_draining());
        !drains && self.sources.engine.check().is_ok()
    }

    /// Frames that wait, of each tenant that has any or had a session.
    fn waiting(&self) -> BTreeMap<Arc<str>, usize> {
        let queue = self.sources.engine.queue();
        let accounts = self.sources.engine.accounts().all();
        let mut waiting: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        let mut tenants = HashMap::new();
        for account in &accounts {
            let name: Arc<str> = account.name().into();
            waiting.insert(name.clone(), 0);
            tenants.extend(account.owner().map(|owner| (owner, name)));
        }
        for of in queue.owners {
            // Sessions of an open server are owners of their own.
            let tenant = tenants.get(&of.owner).cloned().unwrap_or_default();
            *waiting.entry(tenant).or_default() += of.n_waiting;
        }
        waiting
    }

    fn virtual_tokens(&self) -> Vec<(Arc<str>, f64)> {
        let queue = self.sources.engine.queue();
        let served: HashMap<_, _> = queue.owners.iter().map(|of| (of.owner, of.tokens)).collect();
        let of = |account: Arc<Account>| {
            // Who has nothing there comes back to where the queue stands; so do the sessions of an open
            // server, which compete with each other.
            let tokens = account.owner().and_then(|owner| served.get(&owner).copied());
            (account.name().into(), tokens.unwrap_or(queue.tokens))
        };
        self.sources.engine.accounts().all().into_iter().map(of).collect()
    }

    fn disk(&self, choose: fn(u64, u64) -> u64) -> Values {
        let Ok(disk) = rustix::fs::statvfs(&self.sources.store_dir) else { return Vec::new() };
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        one(choose(bytes(disk.f_bavail), bytes(disk.f_blocks)) as f64)
    }

    fn gpu(&self, choose: fn(&offshoot_proto::v1::DeviceView) -> f64) -> Values {
        let Some(view) = self.gpu.as_ref().and_then(|gpu| gpu.view()) else { return Vec::new() };
        vec![(choose(&view), vec![KeyValue::new("gpu", view.name.clone())])]
    }
}

/// Live ones by the memory that they are in, and the parked.
fn sessions(registry: &Registry) -> Values {
    let mut tenants: BTreeMap<Arc<str>, [usize; 2]> = BTreeMap::new();
    for (tenant, tier) in registry.residency().in_memory() {
        let counts = tenants.entry(tenant).or_default();
        counts[usize::from(tier == Tier::Host)] += 1;
    }
    let stored = registry.owners().counts();
    for tenant in stored.keys() {
        tenants.entry(tenant.clone()).or_default();
    }
    let mut values = Values::new();
    for (name, [device, host]) in tenants {
        let live = registry.live(&name);
        let disk = live.saturating_sub(device + host);
        let parked = stored.get(&name).copied().unwrap_or(0).saturating_sub(live);
        let states = [("device", device), ("host", host), ("disk", disk), ("parked", parked)];
        for (state, n) in states {
            values.push((n as f64, vec![tenant(&name), KeyValue::new("state", state)]));
        }
    }
    values
}

fn one(value: f64) -> Values {
    vec![(value, Vec::new())]
}

fn tenant(name: &str) -> KeyValue {
    KeyValue::new("tenant", name.to_string())
}

fn by_tenant(values: impl IntoIterator<Item = (Arc<str>, f64)>) -> Values {
    values.into_iter().map(|(name, value)| (value, vec![tenant(&name)])).collect()
}
