package chart_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/test/chart"
	"github.com/meshca/meshca/test/parts"
)

func read(t *testing.T, name string) string {
	t.Helper()
	root := must(parts.Root())(t)
	return string(must(os.ReadFile(filepath.Join(root, name)))(t))
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestMadeOfTheChart: what is committed beside the chart is what the chart says.
func TestMadeOfTheChart(t *testing.T) {
	if read(t, chart.Manifests) != must(chart.PlainManifests(t.Context()))(t) {
		t.Errorf("%s is not what the chart renders by default: run `make manifests`", chart.Manifests)
	}
	readme := read(t, chart.README)
	if readme != must(chart.WithTable(readme, read(t, chart.Dir+"/values.yaml")))(t) {
		t.Errorf("%s does not show the values: run `make manifests`", chart.README)
	}
}

// TestTheReadmePushesWhatTheChartPulls: the tag in the README's commands is the chart's.
func TestTheReadmePushesWhatTheChartPulls(t *testing.T) {
	readme, tag := read(t, "README.md"), must(chart.AppVersion())(t)
	for _, image := range []string{"meshca", "meshca-agent"} {
		if !strings.Contains(readme, "docker push registry.example/meshca/"+image+":"+tag+"\n") {
			t.Errorf("README.md does not push %s:%s", image, tag)
		}
	}
}

// TestEveryValueIsKnown: values.yaml documents each key, and the schema knows them and no others.
func TestEveryValueIsKnown(t *testing.T) {
	values := must(chart.ReadValues(read(t, chart.Dir+"/values.yaml")))(t)
	var schema node
	if err := json.Unmarshal([]byte(read(t, chart.Dir+"/values.schema.json")), &schema); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	schema.walk(t, "", known)
	delete(known, "global") // Helm's own
	for _, v := range values {
		if !v.Parent && v.Doc == "" {
			t.Errorf("values.yaml says nothing of %s", v.Path)
		}
		if !known[v.Path] {
			t.Errorf("the schema does not know %s", v.Path)
		}
		delete(known, v.Path)
	}
	for path := range known {
		t.Errorf("the schema knows %s, and values.yaml does not", path)
	}
	if len(values) < 50 {
		t.Errorf("only %d values were read", len(values))
	}
}

// node is a piece of a JSON schema.
type node struct {
	Properties           map[string]node `json:"properties"`
	AdditionalProperties any             `json:"additionalProperties"`
}

func (n node) walk(t *testing.T, at string, known map[string]bool) {
	if len(n.Properties) == 0 {
		return
	}
	if strict, ok := n.AdditionalProperties.(bool); !ok || strict {
		t.Errorf("the schema takes anything below %q", at)
	}
	for name, below := range n.Properties {
		path := strings.TrimPrefix(at+"."+name, ".")
		known[path] = true
		below.walk(t, path, known)
	}
}

func TestWrongValuesAreRefused(t *testing.T) {
	for _, set := range []string{
		"trustdomain=mesh.test", "trustDomain=spiffe://mesh.test", "trustDomain=", "cluster=Main", "ca.replicas=3", "ca.attestation=guess",
		"ca.persistence.size=much", "ca.persistence.whenDeleted=Keep", "trust.refresh=soon", "agent.server=ca.mesh.test", "agent.csi.tokenSeconds=60",
		"agent.csi.kubeletDir=var/lib/kubelet", "agent.startupTaint.key=a b", "image.pullPolicy=Sometimes", "ca.upstream.tape.reel=1", "agent.maxUnavailable=0",
	} {
		if out, err := chart.Render(t.Context(), "--set", set); err == nil {
			t.Errorf("%s is taken:\n%.200s", set, out)
		}
	}
}

// TestNullIsNothing: a value that is set to null, which is how Helm's users take a key away, is as one that is not there. A
// group that cannot be missing is refused by the schema, and never by a template's own words.
func TestNullIsNothing(t *testing.T) {
	paths := []string{"ca.signers.name", "ca.publish.clusterTrustBundle", "ca.publish.clusterTrustBundle.name", "ca.publish.linkerd", "ca.publish.linkerd.namespace",
		"ca.publish.istio", "ca.publish.istio.name", "ca.upstream.vault.auth", "ca.upstream.vault.auth.kubernetes", "agent.config.sharedSocket"}
	for _, v := range must(chart.ReadValues(read(t, chart.Dir+"/values.yaml")))(t) {
		paths = append(paths, v.Path)
	}
	for _, path := range paths {
		out, err := chart.Render(t.Context(), "--set", "agent.startupTaint.enabled=true", "--set", path+"=null")
		switch {
		case err != nil && !strings.Contains(err.Error(), "missing property"):
			t.Errorf("%s: null is an error of the template: %.300v", path, err)
		case strings.Contains(out, "<no value>"), strings.Contains(out, "<nil>"):
			t.Errorf("%s: null is rendered", path)
		case err == nil && opensAll(t, out):
			t.Errorf("%s: null opens a NetworkPolicy for all ports", path)
		}
	}
	for _, what := range []string{"clusterTrustBundle", "linkerd", "istio"} { // as in the CA's configuration: nothing is published, so no right is given
		out := must(chart.Render(t.Context(), "--set", "ca.publish."+what+"=null"))(t)
		for _, right := range []string{"clustertrustbundles", "linkerd-identity-trust-roots", "istio-ca-root-cert", "attest", "unpublish"} {
			if strings.Contains(out, right) {
				t.Errorf("ca.publish.%s is null, and %s is in what is rendered", what, right)
			}
		}
	}
}

// opensAll reports whether a rule of a NetworkPolicy names no port where it has a list of them.
func opensAll(t *testing.T, rendered string) bool {
	t.Helper()
	for text := range strings.SplitSeq(rendered, "\n---\n") {
		var policy struct {
			Kind string
			Spec struct{ Egress, Ingress []map[string][]any }
		}
		if !strings.Contains(text, "kind: NetworkPolicy") {
			continue
		}
		if err := yaml.Unmarshal([]byte(text), &policy); err != nil {
			t.Fatal(err)
		}
		for _, rule := range slices.Concat(policy.Spec.Egress, policy.Spec.Ingress) {
			if ports, told := rule["ports"]; told && len(ports) == 0 {
				return true
			}
		}
	}
	return false
}

func TestReadValues(t *testing.T) {
	got, err := chart.ReadValues("# One.\na: 1\nb:\n  # Two,\n  # and more.\n  c:\n    - x: y\n    - z\n  # Three.\n  d: {}\n\n# alone\n\n# Four.\ne: \"\"\n")
	want := []chart.Value{
		{Path: "a", Default: "1", Doc: "One."}, {Path: "b", Parent: true}, {Path: "b.c", Default: "- x: y - z", Doc: "Two, and more."},
		{Path: "b.d", Default: "{}", Doc: "Three."}, {Path: "e", Default: `""`, Doc: "Four."},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := chart.ReadValues("a: 1\n    b: 2\n"); err == nil {
		t.Errorf("a key of nothing was read: %+v", got)
	}
}

// TestConfigurations: the daemons take what the chart writes for them, in every shape that it has.
func TestConfigurations(t *testing.T) {
	bin := t.TempDir()
	root := must(parts.Root())(t)
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/meshca", "./cmd/meshca-agent")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, test := range map[string]struct {
		values string
		ca     []string // in what the CA is configured with
		agent  []string
	}{
		"by default": {"", []string{"trust domain cluster.local, 1 clusters"}, []string{"cluster main", "those of pods by CSI volumes"}},
		"with policy and more clusters": {`
trustDomain: mesh.example
cluster: east
ca:
  attestation: jwks
  signers: {podCertificateRequests: true, certificateSigningRequests: true}
  publish: {clusterTrustBundle: {}, linkerd: {}, istio: {}}
  policy: {rules: [{name: all, ttl: 1h, id: "/{cluster}/{namespace}/{serviceAccount}"}]}
  clusters: [{name: west, kubeconfig: /etc/west/kubeconfig}]
  config: {svid: {ttl: 2h}}
agent:
  config: {logLevel: debug, csi: {timeout: 30s}}
  startupTaint: {enabled: true}
  sharedSocket: {enabled: true}
`, []string{"trust domain mesh.example, 2 clusters", "all"}, []string{"cluster east"}},
		"with Vault": {`
ca:
  upstream: {vault: {address: "https://vault.example:8200", mount: pki_mesh, issuer: root-1, auth: {kubernetes: {role: meshca}}}}
`, []string{"1 clusters"}, nil},
		"with a CA elsewhere": {"ca: {enabled: false}\nagent: {server: \"ca.mesh.example:8443\"}\n", nil, []string{"cluster main"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "values.yaml")
			write(t, file, test.values)
			maps := configMaps(t, must(chart.Render(t.Context(), "--values", file))(t))
			if policy, ok := maps["meshca-policy"]["policy.yaml"]; ok {
				write(t, filepath.Join(dir, "policy.yaml"), policy)
			}
			for _, c := range []struct {
				command, object, key string
				want                 []string
			}{{"meshca", "meshca", "meshca.yaml", test.ca}, {"meshca-agent", "meshca-agent", "agent.yaml", test.agent}} {
				text, ok := maps[c.object][c.key]
				if !ok {
					if c.want != nil {
						t.Errorf("there is no %s", c.key)
					}
					continue
				}
				file := filepath.Join(dir, c.key)
				write(t, file, strings.ReplaceAll(text, "/etc/meshca-policy/policy.yaml", filepath.Join(dir, "policy.yaml")))
				out, err := exec.Command(filepath.Join(bin, c.command), "config", "check", file).CombinedOutput()
				if err != nil {
					t.Errorf("%s refuses its configuration: %v\n%s\n%s", c.command, err, out, text)
				}
				for _, want := range c.want {
					if !strings.Contains(string(out), want) {
						t.Errorf("%s reads its configuration without %q:\n%s", c.command, want, out)
					}
				}
			}
		})
	}
}

// TestReadersAreGivenTheirTime: a root signs when the slowest reader of what is published can have it.
func TestReadersAreGivenTheirTime(t *testing.T) {
	const byDefault = "" // as the CA's configuration has it: ten minutes
	for _, test := range []struct{ set, agents, others string }{
		{"ca.publish=null", "3m", byDefault},
		{"trust.refresh=5m", "5m", byDefault},
		{"ca.publish.istio.name=i", "3m", byDefault},
		{"ca.publish.clusterTrustBundle.name=b,trust.refresh=2m", "2m", byDefault},
		{"ca.publish.istio.name=i,trust.refresh=180s", "180s", byDefault},
		{"ca.publish.linkerd.name=l,trust.refresh=20m", "20m", byDefault},
		{"ca.publish.istio.name=i,ca.publish.refresh=30m", "3m", "30m"},
	} {
		text := configMaps(t, must(chart.Render(t.Context(), "--set", test.set))(t))["meshca"]["meshca.yaml"]
		var got struct {
			Clusters []struct {
				Publish struct{ Refresh, AgentsRefresh string }
			}
		}
		if err := yaml.Unmarshal([]byte(text), &got); err != nil || len(got.Clusters) != 1 {
			t.Fatalf("%s: %v\n%s", test.set, err, text)
		}
		if p := got.Clusters[0].Publish; p.AgentsRefresh != test.agents || p.Refresh != test.others {
			t.Errorf("%s: agents have %q, want %q; others %q, want %q", test.set, p.AgentsRefresh, test.agents, p.Refresh, test.others)
		}
	}
}

// TestValuesThatDoNothing are refused, with the one that does.
func TestValuesThatDoNothing(t *testing.T) {
	for set, want := range map[string]string{
		"ca.publish.agents.name=other":           "trust.configMap",
		"ca.publish.agentsRefresh=5m":            "trust.refresh",
		"agent.config.sharedSocket.enabled=true": "agent.sharedSocket.enabled",
	} {
		if out, err := chart.Render(t.Context(), "--set", set); err == nil || !strings.Contains(err.Error()+out, want) {
			t.Errorf("%s: %v", set, err)
		}
	}
}

// TestAnUnreadyCAIsRolled: a StatefulSet of the default kind rolls nothing while its pod is not ready.
func TestAnUnreadyCAIsRolled(t *testing.T) {
	rendered := must(chart.Render(t.Context()))(t)
	if set := objects[appsv1.StatefulSet](t, rendered, "StatefulSet")["meshca"].Spec; set.PodManagementPolicy != appsv1.ParallelPodManagement || *set.Replicas != 1 {
		t.Errorf("%s, %d replicas", set.PodManagementPolicy, *set.Replicas)
	}
}

// TestVaultInPlaceOfTheDisk: the CA logs in with a token that its pod has, and nothing makes a root for it.
func TestVaultInPlaceOfTheDisk(t *testing.T) {
	rendered := must(chart.Render(t.Context(), "--set", "ca.upstream.vault.address=https://v,ca.upstream.vault.auth.kubernetes.role=meshca,ca.vaultAudience=v"))(t)
	pod := objects[appsv1.StatefulSet](t, rendered, "StatefulSet")["meshca"].Spec.Template.Spec
	if len(pod.InitContainers) > 0 {
		t.Errorf("%s runs before the CA", pod.InitContainers[0].Name)
	}
	at := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == "vault" })
	if at < 0 || pod.Volumes[at].Projected.Sources[0].ServiceAccountToken.Audience != "v" {
		t.Fatalf("there is no token for Vault: %+v", pod.Volumes)
	}
	token := ""
	for _, mount := range pod.Containers[0].VolumeMounts {
		if mount.Name == "vault" {
			token = mount.MountPath + "/" + pod.Volumes[at].Projected.Sources[0].ServiceAccountToken.Path
		}
	}
	if config := configMaps(t, rendered)["meshca"]["meshca.yaml"]; token == "" || !strings.Contains(config, "tokenFile: "+token) || strings.Contains(config, "disk") {
		t.Errorf("the token is at %q, and the CA is told\n%s", token, config)
	}
}

// TestTheRuntimeLeavesRoomBelowTheLimit: what the daemons give back in time the kernel does not end them for, and it counts
// more than the runtime does. Whoever changes the limit need not think of it.
func TestTheRuntimeLeavesRoomBelowTheLimit(t *testing.T) {
	for _, limit := range []string{"512Mi", "1Gi", "300M"} {
		rendered := must(chart.Render(t.Context(), "--set", "agent.resources.limits.memory="+limit+",ca.resources.limits.memory="+limit))(t)
		for name, c := range map[string]corev1.Container{
			"agent": objects[appsv1.DaemonSet](t, rendered, "DaemonSet")["meshca-agent"].Spec.Template.Spec.Containers[0],
			"CA":    objects[appsv1.StatefulSet](t, rendered, "StatefulSet")["meshca"].Spec.Template.Spec.Containers[0],
		} {
			env := map[string]string{}
			for _, e := range c.Env { // as the kubelet makes it
				value := e.Value
				for known, is := range env {
					value = strings.ReplaceAll(value, "$("+known+")", is)
				}
				if e.ValueFrom != nil && e.ValueFrom.ResourceFieldRef.Resource == "limits.memory" {
					divisor := max(e.ValueFrom.ResourceFieldRef.Divisor.Value(), 1)
					value = strconv.FormatInt((c.Resources.Limits.Memory().Value()+divisor-1)/divisor, 10)
				}
				env[e.Name] = value
			}
			got, err := strconv.ParseFloat(env["GOMEMLIMIT"], 64)
			if share := got / c.Resources.Limits.Memory().AsApproximateFloat64(); err != nil || share < 0.9 || share > 0.96 {
				t.Errorf("%s with %s: GOMEMLIMIT %q is %.3f of it, error %v", name, limit, env["GOMEMLIMIT"], share, err)
			}
		}
	}
}

// TestHostPIDForTheSharedSocket: agents see the node's processes where they need to, and nowhere else.
func TestHostPIDForTheSharedSocket(t *testing.T) {
	for set, want := range map[string]bool{"agent.sharedSocket.enabled=false": false, "agent.sharedSocket.enabled=true": true} {
		rendered := must(chart.Render(t.Context(), "--set", set))(t)
		if pod := objects[appsv1.DaemonSet](t, rendered, "DaemonSet")["meshca-agent"].Spec.Template.Spec; pod.HostPID != want {
			t.Errorf("%s: hostPID is %v", set, pod.HostPID)
		}
		if config := configMaps(t, rendered)["meshca-agent"]["agent.yaml"]; strings.Contains(config, "sharedSocket:") != want {
			t.Errorf("%s: agents are told\n%s", set, config)
		}
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// objects are the documents of a manifest of one kind, by name.
func objects[T any](t *testing.T, manifest, kind string) map[string]T {
	t.Helper()
	found := map[string]T{}
	for _, doc := range strings.Split(manifest, "\n---") {
		var meta struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if meta.Kind != kind {
			continue
		}
		var o T
		if err := yaml.UnmarshalStrict([]byte(doc), &o); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		found[meta.Metadata.Name] = o
	}
	return found
}

func configMaps(t *testing.T, manifest string) map[string]map[string]string {
	t.Helper()
	found := map[string]map[string]string{}
	for name, o := range objects[corev1.ConfigMap](t, manifest, "ConfigMap") {
		found[name] = o.Data
	}
	return found
}
