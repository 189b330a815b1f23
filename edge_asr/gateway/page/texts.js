// Every word of the page in English and Chinese.

const TEXTS = {
  en: {
    "options": "Options", "done": "Done", "mode": "Talk button", "mode-hold": "Hold to talk",
    "mode-toggle": "Press to start, press to stop", "language": "Language of this page",
    "way": "Audio", "way-auto": "Automatic (WebRTC, else WebSocket)", "way-pcm": "Uncompressed (lowest delay)",
    "way-opus": "Compressed (slow networks)", "token": "Token of this station", "dashboard": "Dashboard",
    "authority": "This box's certificate", "history": "Said here",
    "nothing-yet": "Nothing yet. Commands and texts of this session appear here.",
    "confirm": "Yes", "cancel": "No", "confirm-kicker": "Shall I?", "time-left": "Time left to answer",
    "hold": "Hold to talk", "press": "Press to talk", "release": "Let go to send", "press-again": "Press to send",
    "idle": "Ready", "listening": "Listening …", "transcribing": "Transcribing …", "sending-later":
      "No connection: up to 30 s are kept and sent when it is back",
    "keys": "Space bar works too",
    "gateway-on": "Connected", "gateway-off": "No connection", "gateway-connecting": "Connecting",
    "broker-connected": "MES reachable", "broker-offline": "MES away, kept safe", "broker-none": "No broker set",
    "broker-unknown": "MES unknown",
    "command": "Command", "transcript": "Text", "rejected": "Not understood", "expired": "Too late",
    "pending": "Waits for a yes", "kind-confirmed": "confirmed",
    "reason-not-understood": "Not understood", "reason-ambiguous": "Unclear which", "reason-no-speech": "No speech",
    "reason-language": "Other language", "reason-unsafe-number": "Number unclear", "reason-too-noisy": "Too noisy",
    "reason-recognizer-failed": "Recognition failed", "reason-not-confirmed": "Not confirmed",
    "reason-cancelled": "Cancelled", "reason-not-allowed": "Not allowed here",
    "reason-cut-off": "Cut off, say it again",
    "expired-detail": "It took too long to arrive and was not run.",
    "overloaded": "The box is busy; your words are kept and follow.",
    "need-https": "The microphone needs a secure connection.",
    "need-https-help": "Open this page by https:// and install this box's certificate on this device once; see docs/gateway.md.",
    "no-microphone": "No microphone was found.",
    "no-microphone-help": "Connect a headset or microphone, then press the button again.",
    "denied": "This page may not use the microphone.",
    "denied-help": "Allow it in the browser's site settings (the icon beside the address), then press the button again.",
    "busy-microphone": "Another program holds the microphone.",
    "busy-microphone-help": "Close it, then press the button again.",
    "token-needed": "This station has no valid token.",
    "token-needed-help": "Ask who looks after the box for its link, or enter the token here.",
    "enter-token": "Enter token",
    "error-busy": "The box takes nobody else just now; trying again by itself.",
    "error-answered": "That question is not open any more.",
    "error-lost": "What you said has not arrived whole. Please say it again.",
    "error-idle": "Nobody spoke for a long time; a new session begins.",
    "error-old": "The session has ended; a new one begins.",
    "error-revoked": "This station's token is not valid any more.",
    "error-unauthorized": "This station has no valid token.",
    "error-misunderstood": "This page and the box do not understand each other. Reload the page.",
    "error-gone": "The connection was away for too long; a new session begins.",
    "error-failed": "The session failed; a new one begins. Who looks after the box finds more in its log.",
    "kept-too-long": "No connection for too long: the oldest of your words are lost.",
    "lang-zh": "Chinese", "lang-en": "English", "lang-yue": "Cantonese", "lang-ja": "Japanese", "lang-ko": "Korean",
    "emotion-HAPPY": "happy", "emotion-SAD": "sad", "emotion-ANGRY": "angry", "emotion-NEUTRAL": "calm",
    "emotion-FEARFUL": "afraid", "emotion-DISGUSTED": "disgusted", "emotion-SURPRISED": "surprised",
    "event-BGM": "music", "event-Laughter": "laughter", "event-Applause": "applause", "event-Cry": "crying",
    "event-Sneeze": "sneeze", "event-Breath": "breath", "event-Cough": "cough",
    "sure": "sure",
    "watch-token": "Token that may watch", "watch-needed": "This page wants a token with the role watch: edge-asr gateway token add NAME --role watch",
    "alarms": "Alarms", "sources": "Sources and levels", "sessions": "Sessions", "source": "Source", "level": "Level",
    "snr": "S/N", "lost-s": "Lost s", "by": "By", "address": "Address", "state": "State", "said": "Said lately",
    "about": "This box", "figures": "Figures", "nobody": "Nobody", "session-away": "away", "session-talking": "talking", "session-idle": "silent",
    "figure-waiting": "waiting in the outbox", "figure-oldest": "oldest waiting", "figure-dropped": "dropped",
    "figure-finals": "before the recognizer", "figure-rtf": "real-time factor", "figure-utterances": "utterances",
    "figure-cpu": "CPU of a core", "figure-memory": "memory", "figure-temperature": "temperature",
    "clock-good": "set by a time service", "clock-bad": "not set by a time service",
    "about-model": "Model", "about-hash": "SHA-256", "about-provider": "Runs on", "about-grammars": "Grammars",
    "about-broker": "Broker", "about-clock": "Clock",
  },
  zh: {
    "options": "设置", "done": "完成", "mode": "讲话按钮", "mode-hold": "按住说话",
    "mode-toggle": "按一下开始，再按一下结束", "language": "页面语言",
    "way": "音频", "way-auto": "自动（WebRTC，否则 WebSocket）", "way-pcm": "不压缩（延迟最低）",
    "way-opus": "压缩（慢速网络）", "token": "本工位的令牌", "dashboard": "监控面板",
    "authority": "本设备的证书", "history": "本次记录",
    "nothing-yet": "暂无内容。本次会话的指令和文字会显示在这里。",
    "confirm": "是", "cancel": "否", "confirm-kicker": "确认执行吗？", "time-left": "剩余时间",
    "hold": "按住说话", "press": "按下说话", "release": "松开发送", "press-again": "再按发送",
    "idle": "就绪", "listening": "正在听…", "transcribing": "正在识别…",
    "sending-later": "连接已断开：最多保留 30 秒语音，恢复后自动发送",
    "keys": "也可以用空格键",
    "gateway-on": "已连接", "gateway-off": "未连接", "gateway-connecting": "正在连接",
    "broker-connected": "MES 在线", "broker-offline": "MES 离线，已安全保存", "broker-none": "未设置 MQTT",
    "broker-unknown": "MES 状态未知",
    "command": "指令", "transcript": "文字", "rejected": "未听懂", "expired": "已过期",
    "pending": "等待确认", "kind-confirmed": "已确认",
    "reason-not-understood": "未听懂", "reason-ambiguous": "不明确", "reason-no-speech": "没有语音",
    "reason-language": "其他语言", "reason-unsafe-number": "数字不清楚", "reason-too-noisy": "噪声太大",
    "reason-recognizer-failed": "识别失败", "reason-not-confirmed": "未确认",
    "reason-cancelled": "已取消", "reason-not-allowed": "此处不允许",
    "reason-cut-off": "语音中断，请再说一遍",
    "expired-detail": "到达太晚，没有执行。",
    "overloaded": "设备繁忙；您的话已保存，稍后处理。",
    "need-https": "麦克风需要安全连接。",
    "need-https-help": "请用 https:// 打开本页面，并在此设备上安装一次本机证书；参见 docs/gateway.md。",
    "no-microphone": "没有找到麦克风。",
    "no-microphone-help": "请连接耳机或麦克风，然后再按一次按钮。",
    "denied": "本页面不能使用麦克风。",
    "denied-help": "请在浏览器的网站设置中允许（地址栏旁的图标），然后再按一次按钮。",
    "busy-microphone": "另一个程序正在使用麦克风。",
    "busy-microphone-help": "请关闭它，然后再按一次按钮。",
    "token-needed": "本工位没有有效的令牌。",
    "token-needed-help": "请向设备管理员索取链接，或在此输入令牌。",
    "enter-token": "输入令牌",
    "error-busy": "设备目前无法接入更多工位；会自动重试。",
    "error-answered": "这个问题已经关闭。",
    "error-lost": "您的话没有完整送达，请再说一遍。",
    "error-idle": "长时间无人讲话；将开始新的会话。",
    "error-old": "会话已结束；将开始新的会话。",
    "error-revoked": "本工位的令牌已失效。",
    "error-unauthorized": "本工位没有有效的令牌。",
    "error-misunderstood": "本页面与设备无法互相理解，请刷新页面。",
    "error-gone": "连接中断太久；将开始新的会话。",
    "error-failed": "会话出错；将开始新的会话。设备管理员可在日志中查看详情。",
    "kept-too-long": "连接中断太久：最早的语音已丢失。",
    "lang-zh": "中文", "lang-en": "英语", "lang-yue": "粤语", "lang-ja": "日语", "lang-ko": "韩语",
    "emotion-HAPPY": "高兴", "emotion-SAD": "悲伤", "emotion-ANGRY": "生气", "emotion-NEUTRAL": "平静",
    "emotion-FEARFUL": "害怕", "emotion-DISGUSTED": "厌恶", "emotion-SURPRISED": "惊讶",
    "event-BGM": "音乐", "event-Laughter": "笑声", "event-Applause": "掌声", "event-Cry": "哭声",
    "event-Sneeze": "喷嚏", "event-Breath": "呼吸", "event-Cough": "咳嗽",
    "sure": "置信度",
    "watch-token": "可查看的令牌", "watch-needed": "本页面需要角色为 watch 的令牌：edge-asr gateway token add NAME --role watch",
    "alarms": "报警", "sources": "来源与电平", "sessions": "会话", "source": "来源", "level": "电平",
    "snr": "信噪比", "lost-s": "丢失秒数", "by": "方式", "address": "地址", "state": "状态", "said": "最近的话",
    "about": "本设备", "figures": "数据", "nobody": "没有", "session-away": "已断开", "session-talking": "讲话中", "session-idle": "安静",
    "figure-waiting": "待发送", "figure-oldest": "最久等待", "figure-dropped": "已丢弃",
    "figure-finals": "等待识别", "figure-rtf": "实时系数", "figure-utterances": "语句",
    "figure-cpu": "单核 CPU", "figure-memory": "内存", "figure-temperature": "温度",
    "clock-good": "已由时间服务校准", "clock-bad": "未由时间服务校准",
    "about-model": "模型", "about-hash": "SHA-256", "about-provider": "运行于", "about-grammars": "语法",
    "about-broker": "MQTT 服务器", "about-clock": "时钟",
  },
};

let chosen = "en";

export function choose(language) {
  chosen = language in TEXTS ? language : "en";
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
}

/** Whether sentences that the box has written, which is in English, are of the page's language. */
export function speaksTheBoxs() {
  return chosen === "en";
}

export function known(key) {
  return key in TEXTS[chosen];
}

export function text(key) {
  return TEXTS[chosen][key] ?? key.replace(/^[a-z]+-/, "");
}

export function fill(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", text(element.dataset.label));
}
