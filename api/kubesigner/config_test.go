package kubesigner

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestSignerConfig(t *testing.T) {
	c := Config{}
	if err := c.Complete(); err != nil || c.Name != "meshca.io/workload" || c.Enabled() {
		t.Errorf("%+v, %v", c, err)
	}
	for name, good := range map[string]bool{
		"mesh.example/x": true, "a.b.example/pods.of-mine": true,
		"workload": false, "example/x": false, "mesh.example/": false, "/x": false, "mesh.example/x/y": false, "Mesh.example/x": false, "mesh.example/X": false,
		"kubernetes.io/kubelet-serving": false, "x.kubernetes.io/y": false, "mesh.example/" + strings.Repeat("x", 200): false,
	} {
		c := Config{Name: name}
		if err := c.Complete(); (err == nil) != good || err != nil && !strings.HasPrefix(err.Error(), "name: ") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestPublishConfig(t *testing.T) {
	c := PublishConfig{ClusterTrustBundle: &ClusterTrustBundleConfig{}, Agents: &ConfigMapConfig{}, Linkerd: &ConfigMapConfig{}, Istio: &EveryNamespaceConfig{}}
	if err := c.Complete(); err != nil || !c.Enabled() {
		t.Fatal(err)
	}
	if c.Refresh.Duration != 10*time.Minute || c.AgentsRefresh != c.Refresh || c.ClusterTrustBundle.Name != "bundle" || *c.Agents != (ConfigMapConfig{"meshca", "meshca-trust", "bundle.json"}) ||
		*c.Linkerd != (ConfigMapConfig{"linkerd", "linkerd-identity-trust-roots", "ca-bundle.crt"}) || *c.Istio != (EveryNamespaceConfig{"istio-ca-root-cert", "root-cert.pem"}) {
		t.Errorf("%+v, %+v, %+v, %+v, %+v", c.Refresh, c.ClusterTrustBundle, c.Agents, c.Linkerd, c.Istio)
	}
	if err := (&PublishConfig{}).Complete(); err != nil || (&PublishConfig{}).Enabled() {
		t.Errorf("nothing: %v", err)
	}
	for want, c := range map[string]PublishConfig{
		"refresh: ":                 {Refresh: metav1.Duration{Duration: time.Second}},
		"agentsRefresh: ":           {AgentsRefresh: metav1.Duration{Duration: 25 * time.Hour}},
		"clusterTrustBundle.name: ": {ClusterTrustBundle: &ClusterTrustBundleConfig{Name: "A:b"}},
		"agents.namespace: ":        {Agents: &ConfigMapConfig{Namespace: "a/b"}},
		"linkerd.name: ":            {Linkerd: &ConfigMapConfig{Name: "../x"}},
		"istio.key: ":               {Istio: &EveryNamespaceConfig{Key: "a/b"}},
		"agents, linkerd: ":         {Agents: &ConfigMapConfig{"a", "b", "c"}, Linkerd: &ConfigMapConfig{"a", "b", "d"}},
	} {
		if err := c.Complete(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s%v", want, err)
		}
	}
}
