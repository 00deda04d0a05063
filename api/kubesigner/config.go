package kubesigner

import (
	"errors"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// DefaultName is the signer's name where the configuration says no other.
const DefaultName = "meshca.io/workload"

// Config says what of a cluster's requests the CA answers. By default it answers none.
type Config struct {
	// Name is the signer's, by which pods and requests ask for this CA: a domain, a slash, and a name. Also
	// publish.clusterTrustBundle is linked to it. Default "meshca.io/workload".
	Name string `json:"name,omitempty"`
	// PodCertificateRequests: kubelets may ask, for pods with a podCertificate volume. Whoever else may create
	// podcertificaterequests in a namespace may ask for each of its pods, as with tokens. Default false.
	PodCertificateRequests bool `json:"podCertificateRequests,omitempty"`
	// CertificateSigningRequests: pods may ask by themselves, with their own token at the API server, where policy grants
	// them `direct`. Default false.
	CertificateSigningRequests bool `json:"certificateSigningRequests,omitempty"`
}

// PublishConfig says where in a cluster the trust bundle is published. By default nowhere.
type PublishConfig struct {
	// Refresh is how old a bundle the readers of what is published may use: a new root signs for nobody before it has been
	// published for so long. A kubelet brings ConfigMaps, and ClusterTrustBundles that a volume selects by signerName, to its
	// pods within two minutes; of one that a volume names it keeps what it read for five minutes more (seen with 1.36). The
	// rest is for the pods to read it again. Default 10m, 10s to 24h.
	Refresh metav1.Duration `json:"refresh,omitzero"`
	// AgentsRefresh is the same of `agents` alone: no pod reads that again by itself, so three minutes are enough. Default: refresh,
	// 10s to 24h.
	AgentsRefresh metav1.Duration `json:"agentsRefresh,omitzero"`
	// ClusterTrustBundle is for clusterTrustBundle volumes. The object is linked to the signer's name.
	ClusterTrustBundle *ClusterTrustBundleConfig `json:"clusterTrustBundle,omitempty"`
	// Agents is a ConfigMap that agents know the CA by: the bundle in SPIFFE's JSON, with its sequence. Nobody but the CA
	// should be allowed to write it. Default of its fields: meshca, meshca-trust, bundle.json.
	Agents *ConfigMapConfig `json:"agents,omitempty"`
	// Linkerd is the ConfigMap with the trust anchors of a Linkerd that was installed with identity.externalCA. Default of
	// its fields: linkerd, linkerd-identity-trust-roots, ca-bundle.crt.
	Linkerd *ConfigMapConfig `json:"linkerd,omitempty"`
	// Istio is a ConfigMap in every namespace, from which Istio's proxies read the roots of their CA. istiod writes it too
	// (docs/kubernetes-signers.md): two that write undo each other's work. Default of its fields: istio-ca-root-cert,
	// root-cert.pem.
	Istio *EveryNamespaceConfig `json:"istio,omitempty"`
}

// ClusterTrustBundleConfig is one ClusterTrustBundle.
type ClusterTrustBundleConfig struct {
	// Name is the last part of the object's: behind that of the signer, with colons. Default "bundle", which makes
	// "meshca.io:workload:bundle".
	Name string `json:"name,omitempty"`
}

// ConfigMapConfig is one ConfigMap.
type ConfigMapConfig struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	// Key is the one under which the bundle is.
	Key string `json:"key,omitempty"`
}

// EveryNamespaceConfig is a ConfigMap of one name in every namespace.
type EveryNamespaceConfig struct {
	Name string `json:"name,omitempty"`
	// Key is the one under which the bundle is.
	Key string `json:"key,omitempty"`
}

// Enabled reports whether the CA answers any requests.
func (c Config) Enabled() bool { return c.PodCertificateRequests || c.CertificateSigningRequests }

// Complete fills in defaults, and says what is wrong. It calls nobody.
func (c *Config) Complete() error {
	if c.Name == "" {
		c.Name = DefaultName
	}
	domain, name, ok := strings.Cut(c.Name, "/")
	switch {
	case !ok || len(validation.IsFullyQualifiedDomainName(nil, domain)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 || len(c.Name) > 200:
		return fmt.Errorf("name: %.300q is no signer's name: write a domain, a slash and a name, such as %q", c.Name, DefaultName)
	case domain == "kubernetes.io" || strings.HasSuffix(domain, ".kubernetes.io"):
		return fmt.Errorf("name: %q: names below kubernetes.io are Kubernetes' own: use a domain of yours", c.Name)
	}
	return nil
}

// Enabled reports whether anything is published.
func (c PublishConfig) Enabled() bool {
	return c.ClusterTrustBundle != nil || c.Agents != nil || c.Linkerd != nil || c.Istio != nil
}

// Complete fills in defaults, and says all that is wrong. It calls nobody.
func (c *PublishConfig) Complete() error {
	if c.Refresh.Duration == 0 {
		c.Refresh.Duration = 10 * time.Minute
	}
	if c.AgentsRefresh.Duration == 0 {
		c.AgentsRefresh = c.Refresh
	}
	var faults []error
	for _, r := range []struct {
		key string
		metav1.Duration
	}{{"refresh", c.Refresh}, {"agentsRefresh", c.AgentsRefresh}} {
		if d := r.Duration.Duration; d < 10*time.Second || d > 24*time.Hour {
			faults = append(faults, fmt.Errorf("%s: %s is not between 10s and 24h", r.key, d))
		}
	}
	if b := c.ClusterTrustBundle; b != nil {
		set(&b.Name, "bundle")
		if len(validation.IsDNS1123Subdomain(b.Name)) > 0 || len(b.Name) > 50 {
			faults = append(faults, fmt.Errorf("clusterTrustBundle.name: %.100q: lower-case letters, digits, dashes and dots, at most 50", b.Name))
		}
	}
	if m := c.Agents; m != nil {
		faults = append(faults, m.complete("agents", ConfigMapConfig{"meshca", "meshca-trust", "bundle.json"}))
	}
	if m := c.Linkerd; m != nil {
		faults = append(faults, m.complete("linkerd", ConfigMapConfig{"linkerd", "linkerd-identity-trust-roots", "ca-bundle.crt"}))
	}
	if m := c.Istio; m != nil {
		one := ConfigMapConfig{"every", m.Name, m.Key}
		faults = append(faults, one.complete("istio", ConfigMapConfig{"", "istio-ca-root-cert", "root-cert.pem"}))
		m.Name, m.Key = one.Name, one.Key
	}
	if a, l := c.Agents, c.Linkerd; a != nil && l != nil && a.Namespace == l.Namespace && a.Name == l.Name {
		faults = append(faults, fmt.Errorf("agents, linkerd: both are the ConfigMap %s/%s", a.Namespace, a.Name))
	}
	return errors.Join(faults...)
}

func (m *ConfigMapConfig) complete(key string, d ConfigMapConfig) error {
	set(&m.Namespace, d.Namespace)
	set(&m.Name, d.Name)
	set(&m.Key, d.Key)
	switch {
	case len(validation.IsDNS1123Label(m.Namespace)) > 0:
		return fmt.Errorf("%s.namespace: no namespace can be called %.100q", key, m.Namespace)
	case len(validation.IsDNS1123Subdomain(m.Name)) > 0:
		return fmt.Errorf("%s.name: no ConfigMap can be called %.100q", key, m.Name)
	case len(validation.IsConfigMapKey(m.Key)) > 0:
		return fmt.Errorf("%s.key: %.100q is no key of a ConfigMap", key, m.Key)
	}
	return nil
}

func set(s *string, d string) {
	if *s == "" {
		*s = d
	}
}
