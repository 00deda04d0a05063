package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"sigs.k8s.io/yaml"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// Every message that a verb prints has every field of its own in JSON, under protojson's name, also when it is empty.
func TestJSONIsComplete(t *testing.T) {
	for _, m := range []proto.Message{
		&meshcav1.GetStatusResponse{}, &meshcav1.AuthorityStatus{}, &meshcav1.ClusterStatus{}, &meshcav1.AgentInfo{}, &meshcav1.GetAgentStatusResponse{}, &meshcav1.DeliveryStatus{},
		&meshcav1.WorkloadStatus{}, &meshcav1.HeldSVID{}, &meshcav1.ListSVIDsResponse{}, &meshcav1.LedgerEntry{}, &meshcav1.Evidence{}, &meshcav1.TestPolicyResponse{},
		&meshcav1.RuleReading{}, &meshcav1.Grant{}, &meshcav1.ExplainResponse{}, &meshcav1.Decision{}, &meshcav1.DenySVIDResponse{}, &meshcav1.AllowSVIDResponse{},
		&meshcav1.ListDenialsResponse{}, &meshcav1.Denial{}, &meshcav1.RenewSVIDsResponse{},
	} {
		b, err := encode(m)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		fields := m.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if single := f.Kind() == protoreflect.MessageKind && !f.IsList() && !f.IsMap(); single || f.ContainingOneof() != nil {
				continue // left out when it is not set
			}
			if _, ok := got[f.JSONName()]; !ok {
				t.Errorf("%s has no %s in\n%s", m.ProtoReflect().Descriptor().Name(), f.JSONName(), b)
			}
		}
	}
}

func TestJSONIsStable(t *testing.T) {
	m := &meshcav1.Grant{SpiffeId: "spiffe://a/<b>&c", Ttl: durationpb.New(time.Hour), Rule: "x: y"}
	value := statuses{CA: &message{&meshcav1.GetStatusResponse{Version: "v1"}}}
	first, err := encode(m)
	if err != nil {
		t.Fatal(err)
	}
	firstStruct, err := encode(value)
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		if again, _ := encode(m); !bytes.Equal(again, first) {
			t.Fatalf("two encodings:\n%s\n%s", first, again)
		}
		if again, _ := encode(value); !bytes.Equal(again, firstStruct) {
			t.Fatalf("two encodings:\n%s\n%s", firstStruct, again)
		}
	}
	asYAML, err := yaml.JSONToYAML(first)
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if err := errors.Join(json.Unmarshal(first, &a), yaml.Unmarshal(asYAML, &b)); err != nil || !reflect.DeepEqual(a, b) {
		t.Errorf("JSON and YAML differ: %v, %v, %v", a, b, err)
	}
}

func TestUnreachable(t *testing.T) {
	for fault, want := range map[client.Fault]string{
		client.Absent:      "cannot reach the CA at /s: there is no such socket. Is meshca running on this machine? If its socket is elsewhere, name it with --socket=PATH",
		client.Refused:     "cannot reach the CA at /s: the socket is there, and nobody answers at it. meshca has stopped or is still starting: look at its log",
		client.Forbidden:   "cannot reach the CA at /s: permission denied. Only root and the user that runs meshca may open it: try again with sudo",
		client.NotASocket:  "cannot reach the CA at /s: it is no socket. Name the admin socket with --socket=PATH",
		client.NoAnswer:    "cannot reach the CA at /s: it did not take the connection in time. meshca is overloaded or stopped by a debugger; try a longer --timeout",
		client.Unreachable: "cannot reach the CA at /s: permission denied by x",
	} {
		err := fmt.Errorf("%w by x", fs.ErrPermission)
		f := theCA.unreachable(&client.Error{Socket: "/s", Fault: fault, Err: err})
		if f.Error() != want || f.code != exitUnreachable {
			t.Errorf("got  %s (%d)\nwant %s", f, f.code, want)
		}
	}
}

// A refusal keeps its reason and what to do about it; whatever it names cannot move the cursor.
func TestFailed(t *testing.T) {
	err := theCA.failed(refusal.New(refusal.ClusterUnknown, "no \x1b[2J").GRPCStatus().Err())
	var f *failure
	if !errors.As(err, &f) || f.code != exitNo || f.Error() != "the CA refused: no \\u{1b}[2J (CLUSTER_UNKNOWN). "+strings.TrimSuffix(refusal.ClusterUnknown.Do(), ".") {
		t.Errorf("got %v", err)
	}
}

func TestSpell(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 400 * time.Millisecond: "0s", 59 * time.Second: "59s", 59*time.Second + 600*time.Millisecond: "1m", 90 * time.Second: "1m30s", time.Hour: "1h",
		6*time.Hour - time.Second: "5h59m", 71*time.Hour + time.Minute: "71h1m", 72 * time.Hour: "3d", 100*24*time.Hour + 5*time.Hour: "100d5h",
	} {
		if got := spell(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	p := &page{}
	p.table([]string{"A", "EMPTY", "LONG NAME"}, [][]cell{{text("ä\tb"), {}, text("x").as(bad)}, {text("ccc"), {}, {}}})
	if got, want := string(p.bytes()), "A        LONG NAME\nä\\u{9}b  x\nccc\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestWorkloadsOfPods are named by their pods: the sockets of CSI volumes have names that tell nobody anything.
func TestWorkloadsOfPods(t *testing.T) {
	all := []*meshcav1.WorkloadStatus{
		{Socket: "/run/meshca-agent/pods/ab12/mount/socket", TokenFile: "/run/t", State: "pending", Namespace: "shop", Pod: "cart-1"},
		{Socket: "/run/w/till.sock", State: "pending"},
	}
	p := &page{}
	drawWorkloads(p, all)
	drawTrouble(p, all[0])
	got := string(p.bytes())
	for _, want := range []string{"POD OR SOCKET", "shop/cart-1\n", "/run/w/till.sock\n", "socket      /run/meshca-agent/pods/ab12/mount/socket\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Count(got, "pods/ab12") != 1 {
		t.Errorf("the table shows a socket that tells nobody anything:\n%s", got)
	}
}

// A cluster whose tokens are verified can lack what tells the CA of the end of pods; its own last error comes first.
func TestClustersThatAreNotWatched(t *testing.T) {
	for _, c := range []struct{ last, watch, want string }{
		{"", "", ""}, {"", "no right", "what ends is noticed at renewals alone: no right"}, {"timeout", "no right", "timeout"},
	} {
		p := &page{}
		drawClusters(p, &meshcav1.GetStatusResponse{Clusters: []*meshcav1.ClusterStatus{{Name: "one", Healthy: true, LastError: c.last, WatchFault: c.watch}}})
		_, row, _ := strings.Cut(strings.TrimSpace(string(p.bytes())), "\n")
		if !strings.HasSuffix(row, c.want) || (c.want == "") != strings.HasSuffix(row, "yes") {
			t.Errorf("%+v: %q", c, row)
		}
	}
}
