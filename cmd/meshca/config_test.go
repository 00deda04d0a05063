package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/policy"
)

const soundConfig = `
trustDomain: mesh.test
upstream: {disk: {}}
clusters:
  - {name: one, mode: jwks, issuer: "https://one.test", jwks: {file: keys.json}, liveness: none}
`

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDefaults(t *testing.T) {
	c, err := loadConfig(write(t, soundConfig))
	if err != nil {
		t.Fatal(err)
	}
	for got, want := range map[any]any{
		c.Listen: ":8443", c.OpsAddress: "127.0.0.1:9090", c.AdminSocket: "/run/meshca/admin.sock", c.StateDir: "/var/lib/meshca",
		c.SVID.TTL.Duration: 6 * time.Hour, c.Intermediate.TTL.Duration: 72 * time.Hour, c.Ledger.KeepAfterExpiry.Duration: 720 * time.Hour,
		c.Upstream.Disk.KeyFile: "/var/lib/meshca/root.key", c.Clusters[0].Agents[0]: "meshca/meshca-agent",
	} {
		if got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

// Each mistake is refused, and the message names the key.
func TestMistakesAreRefusedByName(t *testing.T) {
	second := "  - {name: two, mode: jwks, issuer: \"https://two.test\", jwks: {file: keys.json}, liveness: none}\n"
	tests := map[string]struct{ config, want string }{
		"unknown key":                   {soundConfig + "colour: blue\n", `unknown field "colour"`},
		"unknown key in a cluster":      {strings.Replace(soundConfig, "name: one", "name: one, colour: blue", 1), `unknown field "clusters[0].colour"`},
		"a key in capitals":             {strings.Replace(soundConfig, "trustDomain", "TRUSTDOMAIN", 1), `unknown field "TRUSTDOMAIN"`},
		"a nested key in capitals":      {strings.Replace(soundConfig, "disk", "DISK", 1), `unknown field "upstream.DISK"`},
		"a key in both cases":           {strings.Replace(soundConfig, "name: one", "name: one, agents: [a/b], Agents: [evil/evil]", 1), `unknown field "clusters[0].Agents"`},
		"a promoted key in capitals":    {strings.Replace(soundConfig, "liveness", "Liveness", 1), `unknown field "clusters[0].Liveness"`},
		"a key twice in a cluster":      {strings.Replace(soundConfig, "name: one", "name: one, agents: [a/b], agents: [c/d]", 1), `"agents" already set`},
		"a number for a name":           {strings.Replace(soundConfig, "name: one", "name: 1", 1), "name"},
		"a key twice":                   {soundConfig + "trustDomain: other.test\n", `"trustDomain" already set`},
		"bad duration":                  {soundConfig + "svid: {ttl: six hours}\n", `svid.ttl: "six hours" is no duration: write it like "90s" or "6h"`},
		"a duration that is null":       {soundConfig + "svid: {ttl: null}\n", "svid.ttl: null is no duration"},
		"a reader's duration":           {soundConfig + "readers: [{name: a, refresh: 1h}, {name: b, refresh: 6hours}]\n", `readers[1].refresh: "6hours" is no duration`},
		"a duration without a unit":     {soundConfig + "svid: {ttl: \"360\"}\n", `svid.ttl: "360" is no duration`},
		"too long a life":               {soundConfig + "svid: {ttl: 7h}\n", "svid.ttl"},
		"too short a life":              {soundConfig + "svid: {ttl: 1s}\n", "svid.ttl"},
		"a life beyond its issuer's":    {soundConfig + "intermediate: {ttl: 7h}\n", "intermediate.ttl"},
		"no trust domain":               {strings.Replace(soundConfig, "trustDomain: mesh.test", "", 1), "trustDomain"},
		"an upper-case trust domain":    {strings.Replace(soundConfig, "mesh.test", "Mesh.Test", 1), "trustDomain"},
		"a trust domain with a path":    {strings.Replace(soundConfig, "mesh.test", "spiffe://mesh.test/x", 1), "trustDomain"},
		"no upstream":                   {strings.Replace(soundConfig, "upstream: {disk: {}}", "", 1), "upstream"},
		"no clusters":                   {"trustDomain: mesh.test\nupstream: {disk: {}}\n", "clusters"},
		"two clusters of one name":      {soundConfig + strings.Replace(second, "two,", "one,", 1), "two are called"},
		"clusters whose IDs collide":    {soundConfig + second, "sameNamespaces"},
		"an address without a port":     {soundConfig + "listen: localhost\n", "listen"},
		"a port that is a name":         {soundConfig + "listen: \":notaport\"\n", "listen: \"notaport\""},
		"no port":                       {soundConfig + "listen: \"127.0.0.1:\"\n", "listen: \"\""},
		"a port beyond all":             {soundConfig + "opsAddress: \":65536\"\n", "opsAddress: \"65536\""},
		"one address for both":          {soundConfig + "listen: 127.0.0.1:9090\n", "same port"},
		"one port on all addresses":     {soundConfig + "listen: \":9090\"\n", "same port"},
		"one port, written in IPv6":     {soundConfig + "listen: \"[::]:9090\"\n", "same port"},
		"one port of localhost":         {soundConfig + "listen: localhost:9090\n", "same port"},
		"a log level that is none":      {soundConfig + "logLevel: loud\n", "logLevel"},
		"too many decisions to keep":    {soundConfig + "rememberedDecisions: 100000000\n", "rememberedDecisions"},
		"a signer without an API":       {strings.Replace(soundConfig, "liveness: none", "liveness: none, signers: {podCertificateRequests: true}", 1), "clusters[0]: signers, publish: "},
		"trust without an API":          {strings.Replace(soundConfig, "liveness: none", "liveness: none, publish: {agents: {}}", 1), "clusters[0]: signers, publish: "},
		"a signer's name that is none":  {strings.Replace(soundConfig, "liveness: none", "signers: {name: workload}", 1), "clusters[0]: signers.name: "},
		"a signer's key that is none":   {strings.Replace(soundConfig, "liveness: none", "signers: {csr: true}", 1), `unknown field "clusters[0].signers.csr"`},
		"trust for nobody":              {strings.Replace(soundConfig, "liveness: none", "publish: {agents: {namespace: a/b}}", 1), "clusters[0]: publish.agents.namespace: "},
		"liveness none, tokenReview":    {strings.Replace(soundConfig, "mode: jwks, issuer: \"https://one.test\", jwks: {file: keys.json}", "mode: tokenReview", 1), "liveness"},
		"a cluster name that is a path": {strings.Replace(soundConfig, "name: one", "name: ../one", 1), "name"},
		"an agent that is no account":   {strings.Replace(soundConfig, "name: one", "name: one, agents: [nonsense]", 1), "agents"},
		"a negative limit":              {soundConfig + "limits: {openCalls: -5}\n", "limits.openCalls"},
		"a limit beyond all measure":    {soundConfig + "limits: {openCalls: 4294967296}\n", "limits.openCalls"},
		"calls beyond all measure":      {soundConfig + "limits: {callsPerSecond: 1e300}\n", "limits.callsPerSecond"},
		"too long a socket path":        {soundConfig + "adminSocket: /run/" + strings.Repeat("x", 110) + "\n", "adminSocket"},
		"a bundle over the root key":    {soundConfig + "bundleFile: /var/lib/meshca/root.key\n", "upstream.disk.keyFile"},
		"an audit log over the store":   {soundConfig + "audit: {file: /var/lib/meshca/./meshca.db}\n", "stateDir"},
		"no YAML":                       {"\t", "configuration"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := loadConfig(write(t, tt.config))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to say %q", err, tt.want)
			}
		})
	}
	for _, sound := range []string{
		"listen: 127.0.0.1:0\nopsAddress: 127.0.0.1:0\n", "listen: 192.0.2.1:9090\nopsAddress: 192.0.2.2:9090\n", "listen: ca.test:8443\n",
	} {
		if _, err := loadConfig(write(t, soundConfig+sound)); err != nil {
			t.Errorf("%s: %v", sound, err)
		}
	}
	if _, err := loadConfig(filepath.Join(t.TempDir(), "absent.yaml")); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("an absent file: %v", err)
	}
	if _, err := loadConfig(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: %v", err)
	}
}

func TestABadPolicyIsRefusedAndTheLastGoodOneStays(t *testing.T) {
	c, err := loadConfig(write(t, soundConfig))
	if err != nil {
		t.Fatal(err)
	}
	c.PolicyFile = filepath.Join(t.TempDir(), "policy.yaml")
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(c.PolicyFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	decide := func(f *policyFile) error {
		_, err := f.current.Value().Decide(t.Context(), policy.Input{Cluster: "one", Namespace: "shop", ServiceAccount: "web"})
		return err
	}
	put("rules: [{namespaces: [shop]}]")
	f, seen, err := openPolicy(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	loaded := f.status.Value().loadedAt

	for _, bad := range []string{"rules: [{namespaces: [shop], colour: blue}]", "", "rules: ["} {
		put(bad)
		seen = f.look(seen)
		if err := decide(f); err != nil {
			t.Fatalf("after %q: %v", bad, err)
		}
		if s := f.status.Value(); s.err == nil || !s.loadedAt.Equal(loaded) {
			t.Fatalf("after %q the status is %+v", bad, s)
		}
	}
	if err := os.Remove(c.PolicyFile); err != nil {
		t.Fatal(err)
	}
	if seen = f.look(seen); decide(f) != nil || f.status.Value().err == nil {
		t.Fatal("a policy file that vanished must change nothing and be said")
	}
	// The very text that is in force comes back: the fault is over.
	put("rules: [{namespaces: [shop]}]")
	if seen = f.look(seen); f.status.Value().err != nil {
		t.Fatalf("mended, and still: %v", f.status.Value().err)
	}
	put("rules: [{namespaces: [bank]}]")
	if f.look(seen); decide(f) == nil {
		t.Fatal("the new policy is not in force")
	}
}

func TestABadPolicyAtTheStartIsFatal(t *testing.T) {
	c, err := loadConfig(write(t, soundConfig))
	if err != nil {
		t.Fatal(err)
	}
	c.PolicyFile = write(t, "rules: [{colour: blue}]")
	if _, _, err := openPolicy(c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.PolicyFile) {
		t.Errorf("got %v", err)
	}
}
