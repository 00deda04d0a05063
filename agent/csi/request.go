package csi

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

// What the kubelet adds to a volume's attributes. Those of the pod are there with `podInfoOnMount`, the tokens with
// `tokenRequests`; with `serviceAccountTokenInSecrets` (Kubernetes 1.35) these come among the secrets.
const (
	keyPrefix         = "csi.storage.k8s.io/"
	keyEphemeral      = keyPrefix + "ephemeral"
	keyPodName        = keyPrefix + "pod.name"
	keyPodNamespace   = keyPrefix + "pod.namespace"
	keyPodUID         = keyPrefix + "pod.uid"
	keyServiceAccount = keyPrefix + "serviceAccount.name"
	keyTokens         = keyPrefix + "serviceAccount.tokens"
)

// The volume attributes of our own, beside those of the Writer.
const (
	attributeOptional = "optional"
	attributeTTL      = "ttl"
)

const (
	maxTokensBytes = 128 << 10 // of several audiences together
	maxTokenBytes  = 16 << 10
	maxVolumeID    = 256 // bytes; the CSI spec has 128
	maxPath        = 4096
	maxName        = 253 // bytes of a Kubernetes name
	// minTTL is the shortest life that a pod's author can ask for: the CA keeps a record of each SVID.
	minTTL       = 10 * time.Minute
	maxAttribute = 4 << 10
)

// secret is a token on its way to its file. It prints as a placeholder; within a struct, where fmt calls no methods of
// fields that are not exported, as an address.
type secret struct{ value *string }

// reveal is the token; empty where there is none.
func (s secret) reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

func (secret) String() string               { return "(token)" }
func (secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, "(token)") }
func (secret) MarshalText() ([]byte, error) { return []byte("(token)"), nil }

// pod is whom a volume is for, as the kubelet says.
type pod struct {
	Namespace      string `json:"namespace"`
	Name           string `json:"name"`
	UID            string `json:"uid"`
	ServiceAccount string `json:"serviceAccount"`
}

func (p pod) String() string   { return p.Namespace + "/" + p.Name }
func (p pod) named() agent.Pod { return agent.Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID} }

// wish is what a volume's attributes ask for.
type wish struct {
	Optional bool              `json:"optional,omitempty"`
	TTL      time.Duration     `json:"ttl,omitempty"`
	Files    map[string]string `json:"files,omitempty"` // options of the Writer; empty: no files
}

// check refuses what a new volume may not ask for. One that stands is kept as it is.
func (w wish) check() error {
	if w.TTL > 0 && w.TTL < minTTL {
		return invalid("volume attribute ttl: %v is less than the %v that a volume can ask for; for shorter lives write `ttl` in the rule of the CA's policy that grants this identity", w.TTL, minTTL)
	}
	return nil
}

// ask is a request for a volume.
type ask struct {
	id     string
	target string
	pod    pod
	gid    *int
	wish   wish
	token  secret
}

func invalid(format string, args ...any) error {
	return refusal.New(refusal.VolumeInvalid, format, args...)
}

// checkPath refuses what is no path of a target.
func checkPath(target string) error {
	switch {
	case target == "" || len(target) > maxPath || strings.ContainsRune(target, 0):
		return invalid("target_path is missing or no path")
	case !filepath.IsAbs(target) || target != filepath.Clean(target):
		return invalid("target_path %.255q is not a whole path", target)
	}
	return nil
}

// checkTarget bounds where things are mounted and unmounted: below the kubelet's directory, or where the volume is already. That
// directory may be another one in the configuration by now, and pods that run keep their volumes, and can end.
func (v *volume) checkTarget(target, kubeletDir string) error {
	if strings.HasPrefix(target, kubeletDir+"/") || v.used(nil, target) {
		return nil
	}
	return invalid("target_path %.255q does not lie below kubeletDir, %s", target, kubeletDir)
}

func checkID(id string) error {
	if id == "" || len(id) > maxVolumeID {
		return invalid("volume_id has %d bytes: 1 to %d are taken", len(id), maxVolumeID)
	}
	return nil
}

// parse reads a request for a volume. No error of it holds a token. Where one is wrong with the token alone, the rest of
// the ask is there, its token empty.
func parse(r *csi.NodePublishVolumeRequest, w Writer) (*ask, error) {
	a := &ask{id: r.GetVolumeId(), target: r.GetTargetPath()}
	attributes := r.GetVolumeContext()
	for key, to := range map[string]*string{
		keyPodNamespace: &a.pod.Namespace, keyPodName: &a.pod.Name, keyPodUID: &a.pod.UID, keyServiceAccount: &a.pod.ServiceAccount,
	} {
		if *to = attributes[key]; *to == "" || len(*to) > maxName {
			return nil, invalid("the kubelet did not say %s: the CSIDriver object needs `podInfoOnMount: true`", key)
		}
	}
	if attributes[keyEphemeral] != "true" {
		return nil, invalid("the volume is persistent: this driver makes ephemeral inline volumes only (`csi` in the pod's `volumes`)")
	}
	if r.GetVolumeCapability().GetMount() == nil {
		return nil, invalid("the volume is asked for as a block device: this driver mounts directories only")
	}
	if !r.GetReadonly() {
		return nil, invalid("write `readOnly: true` beside `driver` in the pod's volume: without it the container runtime mounts the volume writable")
	}
	var err error
	if a.gid, err = groupOf(r.GetVolumeCapability().GetMount().GetVolumeMountGroup()); err != nil {
		return nil, err
	}
	if a.wish, err = wishOf(attributes, w); err != nil {
		return nil, err
	}
	a.token, err = tokenOf(r, a.pod)
	return a, err
}

// groupOf reads volume_mount_group, the pod's fsGroup.
func groupOf(s string) (*int, error) {
	if s == "" {
		return nil, nil
	}
	gid, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return nil, invalid("volume_mount_group %.40q is no group's number", s)
	}
	n := int(gid)
	return &n, nil
}

// wishOf reads the attributes that are not the kubelet's.
func wishOf(attributes map[string]string, w Writer) (wish, error) {
	var wanted wish
	var ofWriter []string
	if w != nil {
		ofWriter = w.Attributes()
	}
	for _, key := range slices.Sorted(maps.Keys(attributes)) {
		value := attributes[key]
		if strings.HasPrefix(key, keyPrefix) {
			continue
		}
		if len(value) > maxAttribute {
			return wish{}, invalid("volume attribute %.80q has %d bytes: at most %d are read", key, len(value), maxAttribute)
		}
		switch {
		case key == attributeOptional:
			if value != "true" && value != "false" {
				return wish{}, invalid("volume attribute optional: %.80q is neither \"true\" nor \"false\"", value)
			}
			wanted.Optional = value == "true"
		case key == attributeTTL:
			ttl, err := time.ParseDuration(value)
			if err != nil || ttl <= 0 {
				return wish{}, invalid("volume attribute ttl: %.80q is no duration: write it like \"1h\"", value)
			}
			wanted.TTL = ttl
		case slices.Contains(ofWriter, key):
			if wanted.Files == nil {
				wanted.Files = make(map[string]string)
			}
			wanted.Files[key] = value
		default:
			known := slices.Sorted(slices.Values(append([]string{attributeOptional, attributeTTL}, ofWriter...)))
			return wish{}, invalid("volume attribute %.80q is not known: there are %s", key, strings.Join(known, ", "))
		}
	}
	if wanted.Files != nil {
		if err := w.Check(wanted.Files); err != nil {
			return wish{}, invalid("volume attributes %s: %w", strings.Join(slices.Sorted(maps.Keys(wanted.Files)), ", "), err)
		}
	}
	return wanted, nil
}

// tokenOf finds the token for us. Among the secrets it is the kubelet's for sure; among the attributes a pod's author could
// have written it, where the CSIDriver object has the kubelet ask for none, so it must be the pod's own.
func tokenOf(r *csi.NodePublishVolumeRequest, p pod) (secret, error) {
	passed := r.GetSecrets()[keyTokens]
	if passed == "" {
		passed = r.GetVolumeContext()[keyTokens]
	}
	if passed == "" {
		return secret{}, invalid("the kubelet passed no token: the CSIDriver object needs `tokenRequests` with audience %s", Audience)
	}
	var tokens map[string]struct {
		Token string `json:"token"`
	}
	// What the decoder says could repeat a part of what it read.
	if len(passed) > maxTokensBytes || json.Unmarshal([]byte(passed), &tokens) != nil {
		return secret{}, invalid("%s is not the JSON object of at most %d bytes that kubelets write", keyTokens, maxTokensBytes)
	}
	token := tokens[Audience].Token
	switch uid := podOf(token); {
	case token == "":
		return secret{}, invalid("the kubelet passed no token for audience %s: name it in the CSIDriver object's `tokenRequests`", Audience)
	case len(token) > maxTokenBytes:
		return secret{}, refusal.New(refusal.TokenTooLarge, "the token that the kubelet passed has %d bytes", len(token))
	case strings.TrimSpace(token) != token || strings.ContainsAny(token, "\n\x00"):
		return secret{}, refusal.New(refusal.TokenMalformed, "the token that the kubelet passed holds blanks")
	case uid != "" && uid != p.UID:
		return secret{}, invalid("the token that came with the volume is another pod's (UID %.64q, the pod has %.64q)", uid, p.UID)
	}
	return secret{&token}, nil
}

// podOf is the UID of the pod that a token says it is bound to, unverified; empty where it says none. What it is worth
// the CA decides.
func podOf(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		Kubernetes struct {
			Pod struct {
				UID string `json:"uid"`
			} `json:"pod"`
		} `json:"kubernetes.io"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return ""
	}
	return claims.Kubernetes.Pod.UID
}
