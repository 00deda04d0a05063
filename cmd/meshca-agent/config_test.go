package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/agent/csi"
	"github.com/meshca/meshca/agent/files"
	"github.com/meshca/meshca/api/sds"
)

const minimal = "trustDomain: mesh.test\ncluster: prod\nserver: ca.mesh.test:8443\n"

func workload(lines string) string {
	return minimal + "workloads:\n- socket: /run/w/a.sock\n  tokenFile: /run/w/a.token\n" + lines
}

func TestParseConfig(t *testing.T) {
	c, err := parseConfig([]byte(workload("  mode: \"0660\"\n  uid: 1337\n  ttl: 1h\n")))
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.agent(nil)
	if err != nil {
		t.Fatal(err)
	}
	w := a.Workloads[0]
	if w.Mode != 0o660 || *w.UID != 1337 || w.GID != nil || w.TTL.Hours() != 1 {
		t.Errorf("workload %+v", w)
	}
	if a.AdminSocket != "/run/meshca-agent/admin.sock" || a.OpsAddress != "127.0.0.1:9091" || a.StateDir != "/var/lib/meshca-agent" {
		t.Errorf("defaults %+v", a)
	}
}

// Both are off unless they are asked for: the one makes calls to a cluster, the other takes away what a restart would use.
func TestWhatIsForClustersAlone(t *testing.T) {
	for lines, want := range map[string]struct {
		cleanUp bool
		taint   string
	}{"": {}, "cleanUp: true\nstartupTaint: meshca.io/agent-not-ready\n": {true, "meshca.io/agent-not-ready"}} {
		c, err := parseConfig([]byte(minimal + lines))
		if err != nil {
			t.Fatal(err)
		}
		a, err := c.agent(nil)
		if err != nil || a.CleanUp != want.cleanUp || c.StartupTaint != want.taint {
			t.Errorf("%q: %v, clean up %v, taint %q", lines, err, a.CleanUp, c.StartupTaint)
		}
	}
}

func TestTheSharedSocketHasADirectoryOfItsOwn(t *testing.T) {
	for text, want := range map[string]string{
		"sharedSocket: {enabled: true}\n":                                             "/run/meshca-agent/shared/agent.sock",
		"runtimeDir: /r\nsharedSocket: {enabled: true, cgroupRoot: /kubelet.slice}\n": "/r/shared/agent.sock",
		"sharedSocket: {enabled: true, path: /run/sockets/a.sock}\n":                  "/run/sockets/a.sock",
		"sharedSocket: {enabled: true, path: /run/meshca-agent/own/a.sock}\n":         "/run/meshca-agent/own/a.sock",
	} {
		c, err := parseConfig([]byte(minimal + text))
		if err != nil || c.SharedSocket.path(c.RuntimeDir) != want {
			t.Errorf("%q: %v, %v", text, c, err)
		}
	}
	if c, err := parseConfig([]byte(minimal)); err != nil || c.SharedSocket.Enabled {
		t.Errorf("it is on by default: %v", err)
	}
}

func TestEveryLimitOfSDSIsASetting(t *testing.T) {
	c, err := parseConfig([]byte(minimal + `sds:
  connectionsPerSocket: 1
  streamsPerSocket: 2
  connectionsPerPod: 12
  streamsPerPod: 13
  streams: 3
  namesPerStream: 4
  streamsPerConnection: 5
  nameBytesPerSocket: 6
  spareNameBytes: 14
  largeRequestBytes: 15
  largeRequests: 16
  answerBacklogPerSocket: 17
  spareAnswerBacklog: 18
  requestBytes: 7
  answerBytes: 8
  requestsPerSecond: 9
  firstRequest: 10s
  send: 11s
`))
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.agent(nil)
	if err != nil {
		t.Fatal(err)
	}
	want := sds.Limits{
		StreamsPerPeer: 2, Streams: 3, Names: 4, StreamsPerConnection: 5, NameBytes: 6, RequestBytes: 7, AnswerBytes: 8,
		SpareNameBytes: 14, LargeRequestBytes: 15, LargeRequests: 16, AnswerBacklog: 17, SpareAnswerBacklog: 18,
		RequestsPerSecond: 9, FirstRequest: 10 * time.Second, Send: 11 * time.Second,
	}
	called := a.SDS.Called
	a.SDS.Called = nil
	if !reflect.DeepEqual(a.SDS, want) || a.ConnectionsPerSocket != 1 || a.ConnectionsPerPod != 12 || a.StreamsPerPod != 13 {
		t.Errorf("got %+v, %d connections, and of a pod %d with %d streams; want %+v", a.SDS, a.ConnectionsPerSocket, a.ConnectionsPerPod, a.StreamsPerPod, want)
	}
	for i, limits := 0, reflect.ValueOf(want); i < limits.NumField(); i++ {
		name := limits.Type().Field(i).Name
		if name == "Called" {
			continue
		}
		if limits.Field(i).IsZero() {
			t.Errorf("no setting is tested for %s", name)
		}
		// A refusal names the setting that this limit comes from.
		key, ok := strings.CutPrefix(called[name], "sds.")
		if !ok {
			t.Errorf("%s is called %q", name, called[name])
			continue
		}
		only, err := parseConfig([]byte(minimal + "sds: {" + key + ": 1}\n"))
		if err != nil {
			only, err = parseConfig([]byte(minimal + "sds: {" + key + ": 1s}\n"))
		}
		if err != nil || reflect.ValueOf(only.SDS.limits()).Field(i).IsZero() {
			t.Errorf("%s is called %q, which does not set it: %v", name, called[name], err)
		}
	}
}

func TestEverySettingOfCSI(t *testing.T) {
	c, err := parseConfig([]byte(minimal + `csi:
  enabled: true
  driver: identity.mesh.example
  kubeletDir: /k
  socket: /k/d.sock
  registrationDir: /k/r
  nodeName: worker
  timeout: 30s
`))
	if err != nil {
		t.Fatal(err)
	}
	want := csi.Config{
		Name: "identity.mesh.example", Version: version, Dir: "/run/meshca-agent/pods", KubeletDir: "/k", Socket: "/k/d.sock",
		RegistrationDir: "/k/r", NodeName: "worker", Timeout: 30 * time.Second,
	}
	got := c.CSI.driver(c.RuntimeDir, nil)
	if got.Writer == nil || !slices.Contains(got.Writer.Attributes(), "files") {
		t.Error("volumes cannot ask for files")
	}
	if got.Writer = nil; got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for i, section := 0, reflect.ValueOf(c.CSI); i < section.NumField(); i++ {
		if section.Field(i).IsZero() {
			t.Errorf("no value is tested for %s", section.Type().Field(i).Name)
		}
	}
}

func TestFilesOfWorkloads(t *testing.T) {
	c, err := parseConfig([]byte(workload(`  files:
  - dir: /etc/a/tls
    names: [tls, gke]
    gid: 33
    after: {signal: {name: HUP, pidFile: /run/nginx.pid, process: nginx}}
  - dir: /etc/a/istio
    names: [istio]
    mode: "0400"
    uid: 1
    after: {command: {argv: [/usr/bin/systemctl, reload, haproxy], timeout: 10s}}
  - {dir: /etc/a/one, names: [credentialbundle], after: {http: {url: "https://localhost:8443/reload", socket: /run/a.sock, caFile: /etc/ca.pem, timeout: 1m}}}
`)))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []files.Config{
		{Dir: "/etc/a/tls", Names: []files.Names{files.TLS, files.GKE}, GID: number(33), After: &files.Hook{Signal: &files.Signal{Name: "HUP", PIDFile: "/run/nginx.pid", Process: "nginx"}}},
		{Dir: "/etc/a/istio", Names: []files.Names{files.Istio}, Mode: 0o400, UID: number(1), After: &files.Hook{Command: &files.Command{Argv: []string{"/usr/bin/systemctl", "reload", "haproxy"}, Timeout: 10 * time.Second}}},
		{Dir: "/etc/a/one", Names: []files.Names{files.CredentialBundle}, After: &files.Hook{HTTP: &files.HTTP{URL: "https://localhost:8443/reload", Socket: "/run/a.sock", CAFile: "/etc/ca.pem", Timeout: time.Minute}}},
	} {
		got, err := c.Workloads[0].Files[i].files(nil)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("files[%d]: %+v, %v", i, got, err)
		}
	}
	if source, err := c.files(nil); err != nil || source == nil {
		t.Errorf("%v, %v", source, err)
	}
}

func number(n int) *int { return &n }

func TestParseConfigRefuses(t *testing.T) {
	for name, c := range map[string]struct{ yaml, want string }{
		"empty":                   {"", "trustDomain"},
		"unknown key":             {minimal + "servr: x\n", "servr"},
		"unknown workload key":    {workload("  tokenPath: x\n"), "tokenPath"},
		"key twice":               {minimal + "cluster: b\n", "cluster"},
		"key in capitals":         {strings.Replace(minimal, "cluster:", "CLUSTER:", 1), `unknown field "CLUSTER"`},
		"key in both cases":       {minimal + "Cluster: evil\n", `unknown field "Cluster"`},
		"nested key in capitals":  {workload("  TTL: 1h\n"), `unknown field "workloads[0].TTL"`},
		"nested key twice":        {workload("  ttl: 1h\n  ttl: 2h\n"), `"ttl" already set`},
		"trust domain upper case": {strings.Replace(minimal, "mesh.test\n", "Mesh.Test\n", 1), "trustDomain"},
		"trust domain with path":  {strings.Replace(minimal, "mesh.test\n", "spiffe://mesh.test/a\n", 1), "trustDomain"},
		"cluster":                 {strings.Replace(minimal, "prod", "a/b", 1), "cluster"},
		"server without port":     {strings.Replace(minimal, "ca.mesh.test:8443", "ca.mesh.test", 1), "server"},
		"bad duration":            {workload("  ttl: 5 minutes\n"), `workloads[0].ttl: "5 minutes" is no duration: write it like "90s" or "6h"`},
		"duration as number":      {workload("  ttl: 5\n"), "workloads[0].ttl: 5 is no duration"},
		"negative duration":       {workload("  ttl: -5m\n"), "ttl"},
		"mode not octal":          {workload("  mode: \"0999\"\n"), "mode"},
		"mode with setuid":        {workload("  mode: \"4600\"\n"), "mode"},
		"mode as number":          {workload("  mode: 0600\n"), "mode"},
		"files without names":     {workload("  files: [{dir: /a}]\n"), "workloads[0].files[0]: names is missing"},
		"files of unknown names":  {workload("  files: [{dir: /a, names: [pkcs12]}]\n"), "pkcs12"},
		"files in no place":       {workload("  files: [{names: [tls]}]\n"), "dir is missing"},
		"files in one place":      {workload("  files: [{dir: /a, names: [tls]}, {dir: /a/, names: [gke]}]\n"), "already holds"},
		"files with a bad mode":   {workload("  files: [{dir: /a, names: [tls], mode: \"0666\"}]\n"), "lets others write"},
		"files and no hook":       {workload("  files: [{dir: /a, names: [tls], after: {}}]\n"), "name one of"},
		"files and two hooks":     {workload("  files: [{dir: /a, names: [tls], after: {signal: {name: HUP, process: a}, http: {url: \"http://localhost\"}}}]\n"), "name one of"},
		"negative uid":            {workload("  uid: -1\n"), "uid"},
		"relative socket":         {strings.Replace(workload(""), "/run/w/a.sock", "a.sock", 1), "absolute"},
		"no token":                {strings.Replace(workload(""), "  tokenFile: /run/w/a.token\n", "", 1), "tokenFile is missing"},
		"socket too long":         {strings.Replace(workload(""), "/run/w/a.sock", "/"+strings.Repeat("s", 107), 1), "107"},
		"socket with NUL":         {strings.Replace(workload(""), "/run/w/a.sock", "\"/run/\\0/a\"", 1), "NUL"},
		"one socket twice":        {workload("- socket: /run/w/./a.sock\n  tokenFile: /b\n"), "already"},
		"admin socket twice":      {workload("- socket: /run/meshca-agent/admin.sock\n  tokenFile: /b\n"), "admin socket"},
		"log level":               {minimal + "logLevel: loud\n", "logLevel"},
		"negative limit":          {minimal + "sds: {streams: -1}\n", "sds.streams is negative"},
		"negative time limit":     {minimal + "sds: {send: -1s}\n", "sds.send is negative"},
		"answer beyond gRPC":      {minimal + "sds: {answerBytes: 3000000000}\n", "sds.answerBytes"},
		"csi not enabled":         {minimal + "csi: {kubeletDir: /k}\n", "csi.enabled"},
		"csi unknown key":         {minimal + "csi: {enabled: true, nodename: x}\n", `unknown field "csi.nodename"`},
		"csi timeout":             {minimal + "csi: {enabled: true, timeout: 2m}\n", "csi: timeout"},
		"shared not enabled":      {minimal + "sharedSocket: {cgroupRoot: /k}\n", "sharedSocket.enabled"},
		"shared unknown key":      {minimal + "sharedSocket: {enabled: true, socket: /x}\n", `unknown field "sharedSocket.socket"`},
		"shared relative":         {minimal + "sharedSocket: {enabled: true, path: agent.sock}\n", "sharedSocket.path"},
		"shared beside keys":      {minimal + "sharedSocket: {enabled: true, path: /run/meshca-agent/agent.sock}\n", "holds keys"},
		"shared above keys":       {minimal + "sharedSocket: {enabled: true, path: /run/agent.sock}\n", "holds keys"},
		"shared among keys":       {minimal + "sharedSocket: {enabled: true, path: /run/meshca-agent/keys/a.sock}\n", "lies in /run/meshca-agent/keys"},
		"shared below keys":       {minimal + "sharedSocket: {enabled: true, path: /run/meshca-agent/keys/x/a.sock}\n", "lies in /run/meshca-agent/keys"},
		"shared below pods":       {minimal + "runtimeDir: /r/\nsharedSocket: {enabled: true, path: /r/pods/x/y/a.sock}\n", "lies in /r/pods"},
		"shared in streams":       {minimal + "sharedSocket: {enabled: true, path: /run/meshca-agent/streams/a.sock}\n", "lies in /run/meshca-agent/streams"},
		"shared beside the state": {minimal + "sharedSocket: {enabled: true, path: /var/lib/meshca-agent/a.sock}\n", "holds the trust bundle"},
		"shared beside orders":    {minimal + "adminSocket: /run/orders/admin.sock\nsharedSocket: {enabled: true, path: /run/orders/a.sock}\n", "holds the admin socket"},
		"shared beside a token":   {minimal + "sharedSocket: {enabled: true, path: /var/run/secrets/a.sock}\n", "holds the agent's token"},
		"shared beside a bundle":  {minimal + "sharedSocket: {enabled: true, path: /etc/meshca/a.sock}\n", "holds the bundle file"},
		"shared beside another":   {workload("sharedSocket: {enabled: true, path: /run/w/shared.sock}\n"), "holds workloads[0]'s socket"},
		"shared beside files":     {workload("  files: [{dir: /srv/own/tls, names: [tls]}]\nsharedSocket: {enabled: true, path: /srv/own/a.sock}\n"), "holds workloads[0]'s files"},
		"shared root":             {minimal + "sharedSocket: {enabled: true, cgroupRoot: kubelet}\n", "sharedSocket.cgroupRoot"},
		"csi without room":        {minimal + "runtimeDir: /" + strings.Repeat("r", 80) + "\ncsi: {enabled: true}\n", "shorter directory"},
		"not YAML":                {"\t{", "yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseConfig([]byte(c.yaml))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something about %q", err, c.want)
			}
		})
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(workload("  mode: \"0660\"\n  ttl: 1h\n")))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data)
		if err == nil && (c.TrustDomain == "" || c.Cluster == "" || c.Server == "") {
			t.Errorf("accepted without what is required: %+v", c)
		}
	})
}

func TestCommands(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(file, []byte(workload("")), 0o600); err != nil {
		t.Fatal(err)
	}
	pods := filepath.Join(t.TempDir(), "pods.yaml")
	if err := os.WriteFile(pods, []byte(minimal+"csi: {enabled: true}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("nothing: here\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		want string
	}{
		"version":         {[]string{"version"}, 0, "meshca-agent dev"},
		"check":           {[]string{"config", "check", file}, 0, "fine (trust domain mesh.test, cluster prod, 1 workloads)"},
		"check pods":      {[]string{"config", "check", pods}, 0, "0 workloads, and those of pods by CSI volumes)"},
		"check bad":       {[]string{"config", "check", bad}, 1, "unknown field"},
		"check nothing":   {[]string{"config", "check"}, 2, "--help"},
		"check missing":   {[]string{"config", "check", bad + "x"}, 1, "does not exist"},
		"run without":     {[]string{"run"}, 2, "--config"},
		"run bad":         {[]string{"run", "--config", bad}, 1, "unknown field"},
		"unknown flag":    {[]string{"run", "--nope"}, 2, "--help"},
		"unknown command": {[]string{"walk"}, 2, "--help"},
		"completion":      {[]string{"completion", "bash"}, 0, "bash completion"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if code := execute(context.Background(), c.args, &out, &out); code != c.code {
				t.Errorf("exit code %d, want %d", code, c.code)
			}
			if !strings.Contains(out.String(), c.want) {
				t.Errorf("printed %q, want something about %q", out.String(), c.want)
			}
		})
	}
}

// TestExamples takes what the documents show.
func TestExamples(t *testing.T) {
	for _, file := range []string{"meshca-agent.yaml", "files/agent.yaml"} {
		if _, err := loadConfig(filepath.Join("..", "..", "docs", "examples", file)); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "files.md"))
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(text), "```yaml\nworkloads:\n")[1:]
	if len(blocks) != 3 {
		t.Fatalf("docs/files.md shows %d configurations", len(blocks))
	}
	for _, b := range blocks {
		b, _, _ = strings.Cut(b, "```")
		c, err := parseConfig([]byte(minimal + "workloads:\n" + b))
		if err != nil {
			t.Errorf("docs/files.md: %v in\n%s", err, b)
		} else if len(c.Workloads) != 1 || len(c.Workloads[0].Files) != 1 || c.Workloads[0].Files[0].After == nil {
			t.Errorf("docs/files.md: %+v of\n%s", c.Workloads, b)
		}
	}
}
