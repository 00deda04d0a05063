package csi

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

// request is what a kubelet sends for a pod.
func request() *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: "csi-1", TargetPath: "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/identity/mount", Readonly: true,
		VolumeContext: map[string]string{
			keyEphemeral: "true", keyPodName: "web", keyPodNamespace: "shop", keyPodUID: "u", keyServiceAccount: "web",
			keyTokens: tokens(Audience, "token"),
		},
		VolumeCapability: &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}},
	}
}

func TestParse(t *testing.T) {
	r := request()
	r.VolumeContext[attributeOptional], r.VolumeContext[attributeTTL], r.VolumeContext["files"] = "true", "90m", "pem"
	r.GetVolumeCapability().GetMount().VolumeMountGroup = "3000"
	a, err := parse(r, &pen{})
	must(t, err)
	if a.pod != (pod{"shop", "web", "u", "web"}) || *a.gid != 3000 || !a.wish.Optional || a.wish.TTL != 90*time.Minute ||
		len(a.wish.Files) != 1 || a.wish.Files["files"] != "pem" || a.token.reveal() != "token" {
		t.Errorf("got %+v", a)
	}
}

func TestParseRefuses(t *testing.T) {
	with := func(key, value string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.VolumeContext[key] = value }
	}
	for name, c := range map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		want   string
	}{
		"no pod":              {with(keyPodUID, ""), "podInfoOnMount"},
		"a name without end":  {with(keyPodName, strings.Repeat("x", 300)), "podInfoOnMount"},
		"persistent":          {with(keyEphemeral, "false"), "ephemeral inline volumes only"},
		"block":               {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, "block device"},
		"writable":            {func(r *csi.NodePublishVolumeRequest) { r.Readonly = false }, "readOnly: true"},
		"group":               {func(r *csi.NodePublishVolumeRequest) { r.GetVolumeCapability().GetMount().VolumeMountGroup = "-1" }, "no group's number"},
		"unknown attribute":   {with("optinal", "true"), `"optinal" is not known: there are optional, ttl`},
		"files, with no pen":  {with("files", "pem"), "is not known"},
		"optional":            {with(attributeOptional, "yes"), "neither"},
		"ttl":                 {with(attributeTTL, "5 minutes"), "no duration"},
		"negative ttl":        {with(attributeTTL, "-5m"), "no duration"},
		"attribute too large": {with(attributeTTL, strings.Repeat("1", maxAttribute+1)), "at most 4096"},
		"no token":            {with(keyTokens, ""), "`tokenRequests` with audience meshca"},
		"another audience":    {with(keyTokens, tokens("vault", "token")), "no token for audience meshca"},
		"no JSON":             {with(keyTokens, "token"), "not the JSON object"},
		"too many tokens":     {with(keyTokens, tokens(strings.Repeat("x", maxTokensBytes), "token")), "not the JSON object"},
		"token too large":     {with(keyTokens, tokens(Audience, strings.Repeat("x", maxTokenBytes+1))), "has 16385 bytes"},
		"token with lines":    {with(keyTokens, tokens(Audience, "a\nb")), "holds blanks"},
		"another pod's token": {with(keyTokens, tokens(Audience, tokenFor("db", "other", 1))), "another pod's"},
	} {
		r := request()
		c.change(r)
		_, err := parse(r, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if refusal.Of(err).Passing() {
			t.Errorf("%s passes by itself: %v", name, err)
		}
	}
}

func TestTargets(t *testing.T) {
	for target, ok := range map[string]bool{
		"/var/lib/kubelet/pods/u/mount": true, "": false, "/var/lib/kubelet": false, "/var/lib/kubelet/../../../etc": false, "/var/lib/kubeletx/a": false,
		"var/lib/kubelet/a": false, "/var/lib/kubelet/a\x00b": false, "/etc": false, "/var/lib/kubelet/" + strings.Repeat("x", maxPath): false,
	} {
		v := newVolume("/nowhere", "key")
		if err := errors.Join(checkPath(target), v.checkTarget(target, "/var/lib/kubelet")); (err == nil) != ok {
			t.Errorf("%.60q: %v", target, err)
		}
	}
}

func TestASecretPrintsAsAPlaceholder(t *testing.T) {
	hidden := "hidden"
	s := secret{&hidden}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "ask", ask{token: s}, "token", s)
	if all := fmt.Sprintf("%v %+v %#v %s %q", s, ask{token: s}, s, s, s) + log.String(); strings.Contains(all, "hidden") {
		t.Error(all)
	}
}

func TestConfigCheck(t *testing.T) {
	sound := Config{Version: "v1", Dir: "/run/meshca-agent/pods"}
	must(t, sound.Check())
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"name":              {func(c *Config) { c.Name = "-a" }, "no driver's name"},
		"long name":         {func(c *Config) { c.Name = strings.Repeat("a", 64) }, "no driver's name"},
		"relative":          {func(c *Config) { c.KubeletDir = "kubelet" }, "kubeletDir"},
		"longer than needs": {func(c *Config) { c.RegistrationDir = "/var/lib/../lib" }, "registrationDir"},
		"no room":           {func(c *Config) { c.Dir = "/" + strings.Repeat("x", 80) }, "at most 107 fit"},
		"past the kubelet":  {func(c *Config) { c.Timeout = 2 * time.Minute }, "timeout"},
		"negative":          {func(c *Config) { c.Timeout = -1 }, "timeout"},
	} {
		bad := sound
		c.change(&bad)
		if err := bad.Check(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzParse: whatever a pod's author writes into attributes, and whatever stands where tokens should.
func FuzzParse(f *testing.F) {
	f.Add("optional", "true", tokens(Audience, "token"), "2000")
	f.Add("ttl", "1h", tokens(Audience, tokenFor("web", "u", 1)), "")
	f.Add("files", "pem", `{"meshca":{"token":"x","expirationTimestamp":"2030-01-01T00:00:00Z"}}`, "-1")
	f.Add(keyPodUID, "", `{"meshca":null,"":{}}`, "99999999999")
	f.Fuzz(func(t *testing.T, key, value, passed, group string) {
		r := request()
		r.VolumeContext[keyTokens] = passed
		r.VolumeContext[key] = value
		r.GetVolumeCapability().GetMount().VolumeMountGroup = group
		a, err := parse(r, &pen{})
		if err != nil {
			if len(err.Error()) > 2048 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			if refusal.Of(err) == refusal.Internal {
				t.Errorf("no refusal: %v", err)
			}
			return
		}
		switch uid := podOf(a.token.reveal()); {
		case a.token.reveal() == "" || len(a.token.reveal()) > maxTokenBytes:
			t.Errorf("a token of %d bytes", len(a.token.reveal()))
		case uid != "" && uid != a.pod.UID:
			t.Error("another pod's token")
		case a.wish.TTL < 0 || a.gid != nil && *a.gid < 0:
			t.Errorf("got %+v", a)
		}
	})
}

// All volumes of a pod share what it may cost.
func TestVolumesCountForTheirPod(t *testing.T) {
	v := newVolume(t.TempDir(), "key")
	v.state = &state{Pod: pod{Namespace: "shop", Name: "web", UID: "uid-1"}}
	if got := v.workload().Pod; got != (agent.Pod{Namespace: "shop", Name: "web", UID: "uid-1"}) {
		t.Errorf("it counts for %+v", got)
	}
}
