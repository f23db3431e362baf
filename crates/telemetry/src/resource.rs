use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

/// What sends: the same for its traces and its metrics.
#[derive(Debug, Clone, Copy)]
pub struct Service<'a> {
    pub name: &'a str,
    pub version: &'a str,
}

impl Service<'_> {
    /// `service.name`, `service.version` and a `service.instance.id` of this process. What
    /// OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say counts before them.
    pub fn resource(&self) -> Resource {
        let instance = uuid::Uuid::new_v4().to_string();
        self.resource_of(&Resource::builder().build(), instance)
    }

    fn resource_of(&self, environment: &Resource, instance: String) -> Resource {
        let own = [
            ("service.name", self.name.to_string()),
            ("service.version", self.version.to_string()),
            ("service.instance.id", instance),
        ];
        let said = environment.iter().filter(|(key, value)| {
            // What the library says where nobody has said anything.
            !(key.as_str() == "service.name" && value.as_str().starts_with("unknown_service"))
        });
        let said = said.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
        let own = own.map(|(key, value)| KeyValue::new(key, value));
        Resource::builder_empty().with_attributes(own).with_attributes(said).build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_counts_before_the_settings() {
        let service = Service { name: "offshoot-server", version: "1.2" };
        let value = |resource: &Resource, key: &'static str| {
            resource.get(&key.into()).map(|value| value.as_str().into_owned())
        };
        let unknown = KeyValue::new("service.name", "unknown_service");
        let nothing = Resource::builder_empty().with_attribute(unknown).build();
        let plain = service.resource_of(&nothing, "7".into());
        assert_eq!(value(&plain, "service.name").as_deref(), Some("offshoot-server"));
        assert_eq!(value(&plain, "service.version").as_deref(), Some("1.2"));
        assert_eq!(value(&plain, "service.instance.id").as_deref(), Some("7"));
        let said = [("service.name", "trunk-a"), ("k8s.pod.name", "trunk-a-0")];
        let said = said.map(|(key, value)| KeyValue::new(key, value));
        let environment = Resource::builder_empty().with_attributes(said).build();
        let both = service.resource_of(&environment, "7".into());
        assert_eq!(value(&both, "service.name").as_deref(), Some("trunk-a"));
        assert_eq!(value(&both, "k8s.pod.name").as_deref(), Some("trunk-a-0"));
        assert_eq!(value(&both, "service.instance.id").as_deref(), Some("7"));
    }
}
