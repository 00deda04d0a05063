package main

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca/policy"
)

// The whole way, from the file to the sockets: what policy grants no longer is dropped by the agent that holds it, within
// seconds and without a word from anybody; what it grants still is left alone; and what it grants again comes back.
func TestAChangeOfPolicyEndsWhatItGrantsNoLonger(t *testing.T) {
	state, err := os.MkdirTemp("", "dev") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	file := filepath.Join(state, "policy.yaml")
	put := func(text string) {
		t.Helper()
		next := file + ".new"
		if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, file); err != nil {
			t.Fatal(err)
		}
	}
	const before = "rules: [{name: banks, namespaces: [bank]}, {name: shops, namespaces: [shop], when: node.name != \"none\"}]"
	put(before)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- meshcaDev(ctx, "--state", state, "--policy", file, "--workload", "shop/cart", "--workload", "shop/till", "--workload", "bank/vault",
			"--listen", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--agent-ops", "127.0.0.1:0")
	}()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("it ended with %v", err)
		}
	}()
	socket := devState{state}.agentAdmin()
	until := func(what string, want map[string]string) map[string]string {
		t.Helper()
		began := time.Now()
		for end := began.Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			states, serials := workloads(ctx, socket)
			if maps.Equal(states, want) {
				t.Logf("%s: after %v", what, time.Since(began).Round(time.Millisecond))
				return serials
			}
			if time.Now().After(end) {
				t.Fatalf("%s: never; got %v, want %v", what, states, want)
			}
		}
	}
	serials := until("all have theirs", map[string]string{"shop/cart": "fresh", "shop/till": "fresh", "bank/vault": "fresh"})

	put("rules: [{name: banks, namespaces: [bank]}, {namespaces: [shop], serviceAccounts: [till], deny: closed}, {name: shops, namespaces: [shop], when: node.name != \"none\"}]")
	now := until("one is denied", map[string]string{"shop/cart": "fresh", "shop/till": "POLICY_DENIED", "bank/vault": "fresh"})
	if now["shop/cart"] != serials["shop/cart"] || now["bank/vault"] != serials["bank/vault"] || serials["bank/vault"] == "" {
		t.Errorf("others were renewed: %v, then %v", serials, now)
	}
	put("rules: [{name: banks, namespaces: [bank]}]")
	until("none matches", map[string]string{"shop/cart": "POLICY_NO_RULE", "shop/till": "POLICY_NO_RULE", "bank/vault": "fresh"})
	put(before)
	now = until("all is as before", map[string]string{"shop/cart": "fresh", "shop/till": "fresh", "bank/vault": "fresh"})
	if now["bank/vault"] != serials["bank/vault"] {
		t.Error("what policy always granted was renewed")
	}
}

// workloads are the states of an agent's workloads, or why they were refused, and their SVIDs' serials.
func workloads(ctx context.Context, socket string) (states, serials map[string]string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := client.Open(ctx, socket)
	if err != nil {
		return nil, nil
	}
	defer conn.Close()
	status, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return nil, nil
	}
	states, serials = map[string]string{}, map[string]string{}
	for _, w := range status.GetWorkloads() {
		parts := strings.Split(strings.TrimSuffix(w.GetSocket(), ".sock"), "/")
		name := strings.Join(parts[len(parts)-2:], "/")
		states[name], serials[name] = w.GetState(), w.GetSvid().GetSerial()
		if w.GetState() == "refused" {
			states[name] = w.GetLastRefusal().GetReason()
		}
	}
	return states, serials
}

// Before a policy decides, the clusters gather what it asks for; what it no longer asks for they drop only after.
func TestClustersArePreparedForAPolicy(t *testing.T) {
	c, err := loadConfig(write(t, soundConfig))
	if err != nil {
		t.Fatal(err)
	}
	c.Clusters[0].Liveness = kubernetes.LivenessAPI
	c.PolicyFile = filepath.Join(t.TempDir(), "policy.yaml")
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(c.PolicyFile, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("rules: [{when: 'pod.labels.a == \"b\"'}]")
	f, seen, err := openPolicy(c, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var told [][2]policy.Facts // what is gathered, and what the policy in force uses at that moment
	f.prepare = func(all ...*policy.Policy) {
		var gathered policy.Facts
		for _, p := range all {
			gathered |= p.Uses("one")
		}
		told = append(told, [2]policy.Facts{gathered, f.current.Value().Uses("one")})
	}
	put("rules: [{when: 'pod.annotations.a == \"b\"'}]")
	f.look(seen)
	want := [][2]policy.Facts{{policy.PodLabels | policy.PodAnnotations, policy.PodLabels}, {policy.PodAnnotations, policy.PodAnnotations}}
	if len(told) != 2 || told[0] != want[0] || told[1] != want[1] {
		t.Errorf("got %v, want %v", told, want)
	}
}
